//! Chat templates: Jinja as Hugging Face's checkpoints carry it, rendered as transformers renders it.
//!
//! Blocks are trimmed (`trim_blocks`, `lstrip_blocks`), Python's string and dict methods work, and templates may call
//! `raise_exception(message)`, `strftime_now(format)` and `tojson` with Python's spacing. Source: transformers,
//! `utils/chat_template_utils.py`.

use crate::error::{ErrorKind, Result};
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind as JinjaKind, context};
use serde::Serialize;
use serde_json::ser::Formatter;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, …
    pub role: String,
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// A parsed chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    bos: String,
    eos: String,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// Parses a template; `bos` and `eos` are what it sees as `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// [`ErrorKind::ChatTemplate`] naming the line.
    pub fn new(source: String, bos: String, eos: String) -> Result<ChatTemplate> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.add_function("raise_exception", raise_exception);
        env.add_function("strftime_now", |format: &str| strftime(format, now()));
        env.add_filter("tojson", tojson);
        env.add_template_owned(NAME, source).map_err(fault)?;
        Ok(ChatTemplate { env, bos, eos })
    }

    /// The prompt for a chat; with `add_generation_prompt` it ends where the assistant's answer begins. Encode it
    /// without special tokens: the template has written them.
    ///
    /// # Errors
    /// [`ErrorKind::ChatTemplate`] when the template refuses the messages.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_value(Value::from_serialize(messages), add_generation_prompt)
    }

    /// As [`ChatTemplate::render`], for messages with whatever fields the template knows, as a JSON list of objects.
    ///
    /// # Errors
    /// [`ErrorKind::Messages`] when it is no such list, and as [`ChatTemplate::render`].
    pub fn render_json(&self, messages: &str, add_generation_prompt: bool) -> Result<String> {
        let messages: Vec<serde_json::Map<String, serde_json::Value>> =
            serde_json::from_str(messages).map_err(|source| ErrorKind::Messages { source })?;
        self.render_value(Value::from_serialize(&messages), add_generation_prompt)
    }

    fn render_value(&self, messages: Value, add_generation_prompt: bool) -> Result<String> {
        let template = self.env.get_template(NAME).map_err(fault)?;
        let scope = context! {
            messages,
            add_generation_prompt,
            bos_token => self.bos,
            eos_token => self.eos,
            tools => Value::from(()),
            documents => Value::from(()),
        };
        Ok(template.render(scope).map_err(fault)?)
    }
}

fn fault(e: minijinja::Error) -> ErrorKind {
    let line = e.line().map(|l| format!(" (line {l})")).unwrap_or_default();
    let detail = e.detail().map_or_else(|| e.kind().to_string(), str::to_owned);
    ErrorKind::ChatTemplate { message: format!("{detail}{line}") }
}

fn raise_exception(message: String) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(JinjaKind::InvalidOperation, message))
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn tojson(value: Value, kwargs: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    // Accepted and without effect here: nothing is escaped, and keys keep their order.
    let _: Option<Value> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let bad = |e: serde_json::Error| minijinja::Error::new(JinjaKind::BadSerialization, e.to_string());
    let mut out = Vec::new();
    match indent {
        Some(n) => {
            let spaces = vec![b' '; n.min(64)];
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty)).map_err(bad)?;
        }
        None => value
            .serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonSpacing))
            .map_err(bad)?,
    }
    String::from_utf8(out).map_err(|e| minijinja::Error::new(JinjaKind::BadSerialization, e.to_string()))
}

/// One line, with a space after each comma and colon.
struct PythonSpacing;

impl Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
}

/// Seconds since 1970, UTC.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The directives of C's `strftime` that templates use, in UTC and English; others stay as they are.
fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let days = seconds / 86_400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (year, month, day) = civil(days);
    let month_name = MONTHS.get(month as usize - 1).copied().unwrap_or_default();
    let day_name = DAYS.get((days % 7) as usize).copied().unwrap_or_default();
    let day_of_year = days - days_before(year) + 1;
    let hour12 = if hour % 12 == 0 { 12 } else { hour % 12 };
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let bare = directive == Some('-');
        if bare {
            directive = chars.next();
        }
        let two = |n: u64| if bare { n.to_string() } else { format!("{n:02}") };
        let piece = match directive {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('H') => two(hour),
            Some('I') => two(hour12),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name.chars().take(3).collect(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name.chars().take(3).collect(),
            Some('j') if bare => day_of_year.to_string(),
            Some('j') => format!("{day_of_year:03}"),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{}{other}", if bare { "-" } else { "" }),
            None => "%".to_owned(),
        };
        out.push_str(&piece);
    }
    out
}

/// Year, month and day of a number of days since 1970-01-01. Source: Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms", `civil_from_days`.
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// Days from 1970-01-01 to January 1 of a year.
fn days_before(year: u64) -> u64 {
    let leaps = |y: u64| y / 4 - y / 100 + y / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source.to_owned(), "<s>".to_owned(), "</s>".to_owned()).unwrap()
    }

    fn user(text: &str) -> Vec<Message> {
        vec![Message::new("user", text)]
    }

    /// The template of SmolLM2-135M-Instruct.
    const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
        {{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}\
        {% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn smollm2() {
        let t = template(SMOLLM2);
        assert_eq!(
            t.render(&user("Hi <b>&"), true).unwrap(),
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
             <|im_start|>user\nHi <b>&<|im_end|>\n<|im_start|>assistant\n"
        );
        let system = [Message::new("system", "S"), Message::new("user", "U"), Message::new("assistant", "A")];
        assert_eq!(
            t.render(&system, false).unwrap(),
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        );
        assert_eq!(
            t.render_json(r#"[{"role": "system", "content": "S", "x": 1}]"#, false).unwrap(),
            "<|im_start|>system\nS<|im_end|>\n"
        );
    }

    #[test]
    fn python_and_block_trimming() {
        let t = template(
            "{%- for m in messages %}\n    {%- if m.role == 'user' %}\n{{ m['content'].strip().upper() }}\n\
             {{- eos_token }}\n    {%- endif %}\n{%- endfor %}\n  {% if tools is not none %}\nno\n  {% endif %}\nx",
        );
        assert_eq!(t.render(&user(" hi "), true).unwrap(), "HI</s>x");
        let t =
            template("{{ bos_token }}{% for k, v in messages[0].items() %}{{ k }}={{ v[1:] }};{% endfor %}");
        assert_eq!(t.render(&user("hey"), true).unwrap(), "<s>role=ser;content=ey;");
        let t = template(
            "{% for m in messages %}{% break %}{% endfor %}{{ messages[0].content.split('a')[-1] }}",
        );
        assert_eq!(t.render(&user("xaby"), true).unwrap(), "by");
    }

    #[test]
    fn json_is_spaced_as_python_does() {
        let t = template("{{ messages[0].x | tojson }}|{{ messages[0].x | tojson(indent=2) }}");
        let out = t.render_json(r#"[{"x": {"a": [1, "é<'\""], "b": null}}]"#, true).unwrap();
        assert_eq!(
            out,
            "{\"a\": [1, \"é<'\\\"\"], \"b\": null}|{\n  \"a\": [\n    1,\n    \"é<'\\\"\"\n  ],\n  \"b\": null\n}"
        );
    }

    #[test]
    fn templates_can_refuse() {
        let t = template("{{ raise_exception('roles must alternate') }}");
        let e = t.render(&user(""), true).unwrap_err().to_string();
        assert!(e.contains("roles must alternate"), "{e}");
        let e = ChatTemplate::new("a\n{% if %}".to_owned(), String::new(), String::new())
            .unwrap_err()
            .to_string();
        assert!(e.contains("line 2"), "{e}");
        assert!(t.render_json("{}", true).is_err());
    }

    #[test]
    fn dates() {
        // 2024-02-29 13:05:09 UTC, a Thursday.
        let at = 1_709_211_909;
        assert_eq!(strftime("%d %B %Y, %b %a %A %j", at), "29 February 2024, Feb Thu Thursday 060");
        assert_eq!(
            strftime("%F %T %I:%M %p %-m %y 100%% %Q %", at),
            "2024-02-29 13:05:09 01:05 PM 2 24 100% %Q %"
        );
        assert_eq!(strftime("%F %j", 0), "1970-01-01 001");
        assert_eq!(strftime("%F %j", 1_735_689_599), "2024-12-31 366");
        assert_eq!(template("{{ strftime_now('%Y') | length }}").render(&[], true).unwrap(), "4");
    }
}
