//! HTTP requests: certificates of the system, short time limits, redirects without credentials.

use crate::failure::{Failure, Result};
use std::io::Read;
use std::sync::OnceLock;
use std::time::Duration;
use ureq::Agent;
use ureq::http::{HeaderMap, StatusCode};
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// An index or an API answers in a few MB.
const LARGEST_PAGE: u64 = 64 << 20;

/// An answer whose body is still to be read.
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Box<dyn Read + Send>,
}

/// Why there is no answer.
#[derive(Debug)]
pub struct NoAnswer {
    pub url: String,
    pub problem: String,
    /// Whether asking again may help.
    pub transient: bool,
}

impl std::fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.url, self.problem)
    }
}

impl From<NoAnswer> for Failure {
    fn from(e: NoAnswer) -> Failure {
        Failure::environment(e)
    }
}

/// How long to wait for a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Patience {
    /// There is another source: one attempt, a few seconds.
    Short,
    /// Some proxies fetch a whole file before they answer: minutes, and several attempts.
    #[default]
    Long,
}

/// Asks for `url`; any status is an answer. A server that cannot be connected to within five seconds is given up.
///
/// # Errors
/// When no answer arrives.
pub fn get(
    url: &str,
    headers: &[(&str, String)],
    patience: Patience,
) -> std::result::Result<Answer, NoAnswer> {
    let wait = match patience {
        Patience::Short => Duration::from_secs(8),
        Patience::Long => Duration::from_secs(180),
    };
    let mut request = agent().get(url).config().timeout_recv_response(Some(wait)).build();
    for (name, value) in headers {
        request = request.header(*name, value);
    }
    match request.call() {
        Ok(response) => {
            let (head, body) = response.into_parts();
            Ok(Answer { status: head.status, headers: head.headers, body: Box::new(body.into_reader()) })
        }
        Err(e) => {
            let transient = !matches!(
                e,
                ureq::Error::BadUri(_) | ureq::Error::HostNotFound | ureq::Error::RequireHttpsOnly(_)
            );
            Err(NoAnswer { url: url.to_owned(), problem: e.to_string(), transient })
        }
    }
}

/// Asks for a page of text.
///
/// # Errors
/// When no answer arrives, the status is not 200, or the body is no text or unreasonably long.
pub fn get_text(url: &str, headers: &[(&str, String)]) -> Result<(HeaderMap, String)> {
    let answer = get(url, headers, Patience::Long)?;
    if answer.status != StatusCode::OK {
        return Err(status_failure(url, answer.status));
    }
    let mut text = String::new();
    answer
        .body
        .take(LARGEST_PAGE)
        .read_to_string(&mut text)
        .map_err(|e| Failure::environment(format!("{url}: {e}")))?;
    Ok((answer.headers, text))
}

/// What a status other than success means to the user.
pub fn status_failure(url: &str, status: StatusCode) -> Failure {
    match status.as_u16() {
        401 | 403 => Failure::input(format!("{url}: {status}; if the model is gated, set HF_TOKEN")),
        404 => Failure::input(format!("{url}: not found; check the name and the revision")),
        _ => Failure::environment(format!("{url}: {status}")),
    }
}

fn agent() -> &'static Agent {
    static AGENT: OnceLock<Agent> = OnceLock::new();
    AGENT.get_or_init(|| {
        Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("attar/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(Duration::from_secs(5)))
            .timeout_connect(Some(Duration::from_secs(5)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .tls_config(TlsConfig::builder().root_certs(root_certs()).build())
            .build()
            .new_agent()
    })
}

/// The system's certificates (`SSL_CERT_FILE` and `SSL_CERT_DIR` are honoured), or the built-in ones where the system
/// has none.
fn root_certs() -> RootCerts {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        return RootCerts::WebPki;
    }
    RootCerts::from(found.certs.iter().map(|c| Certificate::from_der(c.as_ref()).to_owned()))
}

/// Resolves a link found in the page at `base`.
pub fn join(base: &str, link: &str) -> String {
    if link.contains("://") {
        return link.to_owned();
    }
    let (scheme, rest) = base.split_once("://").unwrap_or(("https", base));
    if let Some(rest) = link.strip_prefix("//") {
        return format!("{scheme}://{rest}");
    }
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    if let Some(absolute) = link.strip_prefix('/') {
        return format!("{scheme}://{host}/{absolute}");
    }
    let path = path.split(['?', '#']).next().unwrap_or("");
    let mut segments: Vec<&str> = path.split('/').collect();
    segments.pop();
    for part in link.split('/') {
        match part {
            "." => {}
            ".." => {
                segments.pop();
            }
            _ => segments.push(part),
        }
    }
    format!("{scheme}://{host}/{}", segments.join("/"))
}

#[cfg(test)]
mod tests {
    use super::join;

    #[test]
    fn links_resolve_as_in_a_browser() {
        let base = "https://h.org/simple/pkg/";
        assert_eq!(join(base, "https://x/y.whl"), "https://x/y.whl");
        assert_eq!(join(base, "//x/y.whl"), "https://x/y.whl");
        assert_eq!(join(base, "/y.whl"), "https://h.org/y.whl");
        assert_eq!(join(base, "y.whl"), "https://h.org/simple/pkg/y.whl");
        assert_eq!(join(base, "../../packages/y.whl"), "https://h.org/packages/y.whl");
    }
}
