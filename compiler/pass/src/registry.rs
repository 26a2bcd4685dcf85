//! Which passes exist: those that are linked in, which register in their own files, and those of loaded plugins.

use crate::decl::PassDecl;
use crate::error::{Error, ErrorKind, Result, nearest};

/// All passes linked into this program, by phase and then by name.
pub fn registered() -> Vec<&'static PassDecl> {
    let mut all = crate::plugin::linked().to_vec();
    all.sort_unstable_by_key(|d| (d.phase, d.name));
    all
}

/// Passes a recipe may name.
#[derive(Clone, Debug)]
pub struct Registry {
    decls: Vec<&'static PassDecl>,
}

impl Registry {
    /// The passes linked into this program.
    ///
    /// # Errors
    /// [`ErrorKind::DuplicatePass`].
    pub fn new() -> Result<Registry> {
        let mut registry = Registry { decls: Vec::new() };
        registered().into_iter().try_for_each(|d| registry.add(d))?;
        Ok(registry)
    }

    /// Adds a pass, keeping the order by phase and name.
    ///
    /// # Errors
    /// [`ErrorKind::DuplicatePass`].
    pub fn add(&mut self, decl: &'static PassDecl) -> Result<()> {
        if self.decls.iter().any(|d| d.name == decl.name) {
            return Err(Error::new(ErrorKind::DuplicatePass { name: decl.name }));
        }
        self.decls.push(decl);
        self.decls.sort_unstable_by_key(|d| (d.phase, d.name));
        Ok(())
    }

    /// Adds a pass in the place of one of its name, if there is one.
    pub fn replace(&mut self, decl: &'static PassDecl) {
        self.decls.retain(|d| d.name != decl.name);
        self.decls.push(decl);
        self.decls.sort_unstable_by_key(|d| (d.phase, d.name));
    }

    /// All passes, by phase and then by name.
    pub fn all(&self) -> &[&'static PassDecl] {
        &self.decls
    }

    /// The pass of that name.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownPass`] with the nearest name.
    pub fn find(&self, name: &str) -> Result<&'static PassDecl> {
        self.decls.iter().copied().find(|d| d.name == name).ok_or_else(|| {
            Error::new(ErrorKind::UnknownPass {
                name: name.to_owned(),
                nearest: nearest(name, self.decls.iter().map(|d| d.name)),
            })
        })
    }
}
