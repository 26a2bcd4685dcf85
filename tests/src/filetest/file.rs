//! A filetest as text: directives, functions, and the comments that belong to each.

use anyhow::{Context, Result};
use attar_ir::{Graph, text};
use std::ops::Range;

pub(super) struct File {
    pub(super) directives: Vec<Directive>,
    pub(super) functions: Vec<Function>,
    lines: Vec<String>,
}

/// `; test MODE[=ARG] [key=value …]`.
pub(super) struct Directive {
    pub(super) mode: String,
    /// What stands behind `MODE=`.
    pub(super) arg: String,
    pub(super) options: Vec<(String, String)>,
    pub(super) text: String,
}

/// A function, and the comments behind it up to the next one.
pub(super) struct Function {
    /// Index of its first line.
    pub(super) first: usize,
    /// Index behind its last line.
    pub(super) end: usize,
    /// Its lines, comments included.
    pub(super) text: String,
    /// Index behind its comments.
    comments_end: usize,
}

/// A block of comments.
pub(super) struct Block {
    pub(super) range: Range<usize>,
    /// Without the comment marks.
    pub(super) lines: Vec<String>,
}

/// Lines to put in the place of others.
pub(super) struct Edit {
    pub(super) range: Range<usize>,
    pub(super) lines: Vec<String>,
}

impl Directive {
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.options.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }
}

impl File {
    pub(super) fn read(text: &str) -> File {
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let starts: Vec<usize> = (0..lines.len()).filter(|i| lines[*i].starts_with("func")).collect();
        let head = starts.first().copied().unwrap_or(lines.len());
        let directives =
            lines[..head].iter().filter_map(|l| l.strip_prefix("; test ")).map(directive).collect();
        let functions = starts.iter().enumerate().map(|(i, &first)| {
            let comments_end = starts.get(i + 1).copied().unwrap_or(lines.len());
            let span = first..comments_end;
            let closing = span.clone().find(|l| lines[*l].starts_with('}'));
            // A function that is never closed goes as far as there is code.
            let is_code = |l: &usize| !lines[*l].trim().is_empty() && !lines[*l].starts_with(';');
            let end = closing.or_else(|| span.rev().find(is_code)).map_or(comments_end, |l| l + 1);
            Function { first, end, text: lines[first..end].join("\n"), comments_end }
        });
        File { directives, functions: functions.collect(), lines }
    }

    /// The comments behind a function: line index and text without the mark.
    pub(super) fn comments<'a>(&'a self, function: &Function) -> impl Iterator<Item = (usize, &'a str)> {
        let range = function.end..function.comments_end;
        range.filter_map(|i| Some((i, self.lines[i].strip_prefix("; ")?)))
    }

    /// The block of that name behind a function.
    pub(super) fn block(&self, function: &Function, name: &str) -> Option<Block> {
        let header = format!("{name}:");
        let (start, _) = self.comments(function).find(|(_, line)| *line == header)?;
        let body = self.lines[start + 1..function.comments_end].iter().take_while(|l| l.starts_with(";   "));
        let lines: Vec<String> = body.map(|l| l[4..].to_owned()).collect();
        Some(Block { range: start..start + 1 + lines.len(), lines })
    }

    /// The text with the edits made.
    pub(super) fn edited(&self, mut edits: Vec<Edit>) -> String {
        edits.sort_by_key(|e| (e.range.start, e.range.end));
        let mut lines = self.lines.clone();
        for edit in edits.into_iter().rev() {
            lines.splice(edit.range, edit.lines);
        }
        lines.join("\n") + "\n"
    }
}

impl Function {
    /// The graph the function is.
    pub(super) fn graph(&self) -> Result<Graph> {
        let mut graphs = text::parse(&self.text)?;
        graphs.pop().context("no function")
    }

    /// Its lines with their indices in the file.
    pub(super) fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(i, line)| (self.first + i, line))
    }
}

fn directive(text: &str) -> Directive {
    let mut words = text.split_whitespace().map(|w| w.split_once('=').unwrap_or((w, "")));
    let (mode, arg) = words.next().unwrap_or_default();
    let options = words.map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    Directive { mode: mode.to_owned(), arg: arg.to_owned(), options, text: text.trim().to_owned() }
}
