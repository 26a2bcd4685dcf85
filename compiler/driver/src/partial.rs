//! What an interrupted compile had worked out: a folder beside the artifact, `OUT.attar.partial`, from which the next compile of
//! the same inputs goes on.
//!
//! The folder belongs to one key, a hash of everything that passes depend on: version and program, checkpoint, recipe, calibration.
//! Under another key it is emptied. Each entry is written aside and renamed, and begins with the hash of what follows: one that is
//! truncated or damaged is as good as none. While a compile uses the folder it holds a lock on it; another compile goes without.
//! The folder goes when the artifact is there.

use crate::calibrate::CalibrationSource;
use crate::inputs::{InputFile, hash_file};
use crate::pipeline::default_passes;
use crate::session::CompileOptions;
use attar_pass::{Fuel, Journal};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Bytes of a hash in front of an entry.
const HASH: usize = 32;
const KEY: &str = "key";
const LOCK: &str = "lock";

/// The journal of a compile.
#[derive(Debug)]
pub(crate) struct PartialResults {
    folder: PathBuf,
    key: String,
    /// Whether what is there is to be forgotten.
    fresh: bool,
    state: RefCell<State>,
    /// Keys of the tensors that were taken back.
    resumed: RefCell<BTreeSet<String>>,
}

#[derive(Debug)]
enum State {
    /// There is nothing on disk yet, or nobody has looked.
    Untouched,
    Open {
        lock: File,
    },
    /// Not to be used, and why.
    Off(String),
}

impl PartialResults {
    /// The journal of a compile; `None` where the results of passes are not those of the whole model, or nothing takes long.
    pub(crate) fn of(options: &CompileOptions, inputs: &[InputFile]) -> Option<PartialResults> {
        let whole =
            options.fuel == Fuel::UNLIMITED && options.sketch.is_none() && options.stop_after.is_none();
        if !whole || options.calibration.source == CalibrationSource::None {
            return None;
        }
        let mut folder = options.out.clone().into_os_string();
        folder.push(".partial");
        Some(PartialResults {
            folder: folder.into(),
            key: key_of(options, inputs),
            fresh: !options.resume,
            state: RefCell::new(State::Untouched),
            resumed: RefCell::default(),
        })
    }

    /// Tensors that were taken from the folder.
    pub(crate) fn resumed(&self) -> u64 {
        self.resumed.borrow().len() as u64
    }

    /// Why an interruption would have lost what was worked out, if so.
    pub(crate) fn problem(&self) -> Option<String> {
        match &*self.state.borrow() {
            State::Off(reason) => Some(reason.clone()),
            _ => None,
        }
    }

    fn failure(&self, e: &std::io::Error) -> String {
        format!("{} cannot be written: {e}", self.folder.display())
    }

    /// Forgets everything: the artifact is there.
    pub(crate) fn remove(&self) {
        if let State::Open { lock } = self.state.replace(State::Off("the artifact is there".to_owned())) {
            drop(lock);
            // What stays behind costs disk and nothing else.
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }

    /// Whether the folder can be used. It is opened when first asked for, and made when there is something to `keep`.
    fn is_open(&self, keep: bool) -> bool {
        let mut state = self.state.borrow_mut();
        if let State::Untouched = *state {
            if !keep && !self.folder.is_dir() {
                return false;
            }
            *state = match self.open() {
                Ok(Some(lock)) => State::Open { lock },
                Ok(None) => State::Off(format!("another compile uses {}", self.folder.display())),
                Err(e) => State::Off(self.failure(&e)),
            };
        }
        matches!(*state, State::Open { .. })
    }

    /// `None` when another compile holds the lock.
    fn open(&self) -> std::io::Result<Option<File>> {
        std::fs::create_dir_all(&self.folder)?;
        let lock = File::create(self.folder.join(LOCK))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(e)) => return Err(e),
        }
        let key = self.folder.join(KEY);
        let same = std::fs::read_to_string(&key).is_ok_and(|k| k == self.key);
        if !same || self.fresh {
            for entry in std::fs::read_dir(&self.folder)? {
                let entry = entry?;
                if entry.file_name() != LOCK {
                    std::fs::remove_file(entry.path())?;
                }
            }
            std::fs::write(&key, &self.key)?;
        }
        Ok(Some(lock))
    }

    fn path_of(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{}.entry", blake3::hash(key.as_bytes()).to_hex()))
    }

    fn write(&self, key: &str, value: &[u8]) -> std::io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        file.write_all(hash_of(key, value).as_bytes())?;
        file.write_all(value)?;
        file.persist(self.path_of(key)).map(|_| ()).map_err(|e| e.error)
    }
}

impl Journal for PartialResults {
    fn has(&self, key: &str) -> bool {
        self.is_open(false) && self.path_of(key).exists()
    }

    fn get(&self, key: &str) -> Option<Vec<u8>> {
        if !self.is_open(false) {
            return None;
        }
        let mut bytes = std::fs::read(self.path_of(key)).ok()?;
        let (hash, value) = bytes.split_at_checked(HASH)?;
        if hash != hash_of(key, value).as_bytes() {
            return None;
        }
        if key.contains("/codes/") {
            self.resumed.borrow_mut().insert(key.to_owned());
        }
        bytes.drain(..HASH);
        Some(bytes)
    }

    fn put(&self, key: &str, value: &[u8]) {
        // On a full disk the compile itself will say so, where it matters.
        if self.is_open(true)
            && let Err(e) = self.write(key, value)
        {
            *self.state.borrow_mut() = State::Off(self.failure(&e));
        }
    }
}

fn hash_of(key: &str, value: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(key.len() as u64).to_le_bytes());
    hasher.update(key.as_bytes());
    hasher.update(value);
    hasher.finalize()
}

/// A hash of everything that passes depend on.
fn key_of(options: &CompileOptions, inputs: &[InputFile]) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut add = |part: &str| {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    };
    let hash = |path: &Path| hash_file(path).map(|f| f.blake3).unwrap_or_default();
    add(crate::GENERATOR);
    // Builds of one version differ while it is worked on.
    add(&std::env::current_exe().map(|path| hash(&path)).unwrap_or_default());
    add(&options.recipe.to_toml());
    options.plugins.iter().for_each(|p| add(&p.blake3));
    default_passes().into_iter().for_each(&mut add);
    for input in inputs {
        add(&input.name);
        add(&input.blake3);
    }
    let calibration = &options.calibration;
    match &calibration.source {
        CalibrationSource::None => add("none"),
        CalibrationSource::Sampled => {
            add("sampled");
            // The kernels that write the text are those of this machine.
            let native = crate::resolve_targets(&["native".to_owned()]).unwrap_or_default();
            native.iter().for_each(|t| add(t.name()));
        }
        CalibrationSource::File(path) => {
            // How a file is read depends on its name.
            let extension = path.extension().unwrap_or_default().to_string_lossy().into_owned();
            ["file", &extension, &hash(path)].into_iter().for_each(&mut add);
        }
        CalibrationSource::Saved(path) => ["saved", &hash(path)].into_iter().for_each(&mut add),
    }
    add(&format!("{} {}", calibration.windows, calibration.context));
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(out: &Path, key: &str) -> PartialResults {
        PartialResults {
            folder: out.to_owned(),
            key: key.to_owned(),
            fresh: false,
            state: RefCell::new(State::Untouched),
            resumed: RefCell::default(),
        }
    }

    #[test]
    fn entries_come_back_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("partial");
        let first = results(&out, "a");
        first.put("x/codes/w", b"value");
        first.put("empty", b"");
        assert_eq!(first.get("x/codes/w").unwrap(), b"value");
        drop(first);
        let second = results(&out, "a");
        assert!(second.has("x/codes/w") && !second.has("other"));
        assert_eq!(
            (second.get("x/codes/w").unwrap(), second.get("empty").unwrap()),
            (b"value".to_vec(), vec![])
        );
        assert_eq!(second.resumed(), 1);
        // Every truncation, and a changed bit.
        let path = second.path_of("x/codes/w");
        let bytes = std::fs::read(&path).unwrap();
        for len in 0..bytes.len() {
            std::fs::write(&path, &bytes[..len]).unwrap();
            assert_eq!(second.get("x/codes/w"), None, "{len}");
        }
        let mut wrong = bytes.clone();
        wrong[HASH + 1] ^= 4;
        std::fs::write(&path, &wrong).unwrap();
        assert_eq!(second.get("x/codes/w"), None);
        // An entry under another name is not taken for it.
        std::fs::copy(second.path_of("empty"), &path).unwrap();
        assert_eq!(second.get("x/codes/w"), None);
    }

    #[test]
    fn other_keys_and_other_compiles_find_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("partial");
        let first = results(&out, "a");
        first.put("x", b"value");
        // While the first is at it, a second neither reads nor writes.
        let beside = results(&out, "a");
        assert_eq!(beside.get("x"), None);
        beside.put("y", b"value");
        assert!(beside.problem().is_some_and(|p| p.starts_with("another compile uses ")));
        assert_eq!(first.problem(), None);
        beside.remove();
        assert!(first.get("y").is_none() && first.get("x").is_some());
        drop(first);
        assert_eq!(results(&out, "b").get("x"), None);
        assert_eq!(results(&out, "a").get("x"), None);
        let last = results(&out, "a");
        last.put("x", b"value");
        last.remove();
        assert!(!out.exists());
        // A file stands where the folder would.
        std::fs::write(&out, b"").unwrap();
        let blocked = results(&out, "a");
        blocked.put("x", b"value");
        assert!(blocked.problem().is_some_and(|p| p.contains("partial cannot be written: ")));
    }
}
