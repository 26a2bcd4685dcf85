//! What starting leaves in memory.
//!
//! Arguments, passes and tokenizers are set up by code that runs once, and the system maps up to 64 KiB of the program's file
//! around each page of it that was touched: some 6 MB. Nothing but a small part of that is needed to generate.

/// Gives back the mapped pages of the program's own code. The few that are still needed are mapped again when they run,
/// from the system's cache of the file. Does nothing where the system does not say what is mapped, or a debugger, whose
/// breakpoints are written into those pages, looks on.
pub fn give_back_code() {
    #[cfg(target_os = "linux")]
    for (start, len) in own_code().unwrap_or_default() {
        // SAFETY: a private mapping of the program's file that was never writable, so its pages hold what the file does, and
        // are read from there again.
        unsafe {
            libc::madvise(std::ptr::with_exposed_provenance_mut(start), len, libc::MADV_DONTNEED);
        }
    }
}

/// Where the program's code is mapped: addresses and lengths.
#[cfg(target_os = "linux")]
fn own_code() -> Option<Vec<(usize, usize)>> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let tracer = status.lines().find_map(|l| l.strip_prefix("TracerPid:"))?;
    if tracer.trim() != "0" {
        return None;
    }
    let program = std::fs::read_link("/proc/self/exe").ok()?;
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    Some(maps.lines().filter_map(|line| code_of(line, program.to_str()?)).collect())
}

/// The range of a line like `5581a000-5592c000 r-xp 0002f000 fe:00 1234   /usr/bin/attar`, when that is code of `program`.
#[cfg(target_os = "linux")]
fn code_of(line: &str, program: &str) -> Option<(usize, usize)> {
    let (range, rest) = line.split_once(' ')?;
    let path = rest.find('/').and_then(|at| rest.get(at..));
    if !rest.starts_with("r-xp ") || path != Some(program) {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    Some((start, end.checked_sub(start)?))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn code_of_the_program_alone_is_found() {
        let program = "/opt/a b/attar";
        let line =
            |perms, path| format!("55e0a000-55e0c000 {perms} 0002f000 fe:00 1234                     {path}");
        assert_eq!(code_of(&line("r-xp", program), program), Some((0x55e0_a000, 0x2000)));
        for (perms, path) in
            [("r--p", program), ("rw-p", program), ("r-xs", program), ("r-xp", "/lib/libc.so.6")]
        {
            assert_eq!(code_of(&line(perms, path), program), None, "{perms} {path}");
        }
        assert_eq!(code_of("7ffc-7ffd r-xp 00000000 00:00 0      [vdso]", program), None);
        assert_eq!(code_of("", program), None);
    }

    /// What was given back runs again when it is called.
    #[test]
    fn code_runs_on_after_it_was_given_back() {
        // Pages of files that are mapped: the third number.
        let mapped = || -> u64 {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').nth(2).unwrap().parse().unwrap()
        };
        for _ in 0..3 {
            let before = mapped();
            give_back_code();
            assert!(mapped() < before, "of {before} pages none was given back");
            assert_eq!(
                format!("{:.3} {:?}", 1.0 / 3.0, "a,b".split(',').collect::<Vec<_>>()),
                "0.333 [\"a\", \"b\"]"
            );
        }
    }
}
