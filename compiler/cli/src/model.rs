//! What MODEL means: a folder, a `.gguf` file, or a name that was pulled.

use crate::failure::{Failure, Result};
use crate::fetch::catalogue;
use crate::home::Home;
use std::path::PathBuf;

/// The checkpoint that `text` names.
///
/// # Errors
/// An input failure when there is no such path and no such name has been pulled.
pub fn find_checkpoint(text: &str) -> Result<PathBuf> {
    let path = PathBuf::from(text);
    if path.exists() {
        return Ok(path);
    }
    let home = Home::from_env()?;
    if let Some((path, _)) = home.find(text) {
        return Ok(path);
    }
    let pullable = catalogue::by_name(text).is_some() || text.starts_with("hf:") || text.contains("://");
    if pullable {
        return Err(Failure::input(format!("{text} has not been pulled; run `attar pull {text}` first")));
    }
    let names: Vec<String> = home.all().into_iter().map(|(_, p)| p.name).collect();
    let pulled = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
    Err(Failure::input(format!(
        "{text}: no such file or folder, and no pulled model of that name (pulled: {pulled})"
    )))
}
