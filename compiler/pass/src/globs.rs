//! Which tensors a step of a recipe concerns.

use crate::error::{Error, ErrorKind, Result};
use globset::{Glob, GlobMatcher};

/// Tensor names chosen by globs: `*` and `?` match any characters, `[…]` and `{a,b}` as in a shell.
#[derive(Clone, Debug)]
pub struct TensorGlobs {
    include: Vec<GlobMatcher>,
    exclude: Vec<GlobMatcher>,
}

impl PartialEq for TensorGlobs {
    fn eq(&self, other: &TensorGlobs) -> bool {
        self.include().eq(other.include()) && self.exclude().eq(other.exclude())
    }
}

impl TensorGlobs {
    /// Every tensor.
    ///
    /// # Errors
    /// Never in practice; the type is that of [`TensorGlobs::new`].
    pub fn all() -> Result<TensorGlobs> {
        TensorGlobs::new(&["*".to_owned()], &[])
    }

    /// Tensors some glob of `include` matches and none of `exclude`.
    ///
    /// # Errors
    /// [`ErrorKind::GlobSyntax`].
    pub fn new(include: &[String], exclude: &[String]) -> Result<TensorGlobs> {
        let compile = |globs: &[String]| globs.iter().map(|g| matcher(g)).collect::<Result<Vec<_>>>();
        Ok(TensorGlobs { include: compile(include)?, exclude: compile(exclude)? })
    }

    /// Globs a name must match.
    pub fn include(&self) -> impl Iterator<Item = &str> {
        self.include.iter().map(|m| m.glob().glob())
    }

    /// Globs a name must not match.
    pub fn exclude(&self) -> impl Iterator<Item = &str> {
        self.exclude.iter().map(|m| m.glob().glob())
    }

    pub fn matches(&self, name: &str) -> bool {
        self.include.iter().any(|m| m.is_match(name)) && !self.exclude.iter().any(|m| m.is_match(name))
    }

    /// Whether the name is listed as it is, not caught by a wildcard: then not doing what was asked is an error.
    pub fn names_exactly(&self, name: &str) -> bool {
        self.include().any(|g| g == name)
    }

    /// Checks that every glob, in `include` and `exclude`, matches at least one of the names.
    ///
    /// # Errors
    /// [`ErrorKind::GlobMatchesNothing`] for the first that does not.
    pub fn check(&self, names: &[&str]) -> Result<()> {
        for m in self.include.iter().chain(&self.exclude) {
            // A catch-all is no claim that anything is there.
            if m.glob().glob() == "*" || names.iter().any(|n| m.is_match(n)) {
                continue;
            }
            let glob = m.glob().glob().to_owned();
            let nearest = crate::error::nearest(&glob, names.iter().copied());
            return Err(Error::new(ErrorKind::GlobMatchesNothing { glob, nearest }));
        }
        Ok(())
    }
}

fn matcher(glob: &str) -> Result<GlobMatcher> {
    match Glob::new(glob) {
        Ok(g) => Ok(g.compile_matcher()),
        Err(e) => {
            Err(Error::new(ErrorKind::GlobSyntax { glob: glob.to_owned(), problem: e.kind().to_string() }))
        }
    }
}
