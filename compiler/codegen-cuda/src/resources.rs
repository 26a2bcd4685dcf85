//! What a kernel takes of the machine, as the assembler's log says.

/// Numbers of one kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Registers of one thread.
    pub registers: u32,
    /// Bytes that a thread writes to memory, and reads back, for want of registers.
    pub spill_stores: u32,
    pub spill_loads: u32,
    /// Bytes of a thread's stack.
    pub stack: u32,
    /// Bytes of shared memory of one block.
    pub shared: u32,
}

impl Resources {
    /// Reads the log of a compilation with `--ptxas-options=-v`; `None` when it says nothing of registers, as for PTX.
    pub fn parse(log: &str) -> Option<Resources> {
        let mut found = Resources::default();
        let mut any = false;
        for line in log.lines() {
            if let Some(n) = before(line, " registers") {
                (found.registers, any) = (n, true);
                found.shared = before(line, " bytes smem").unwrap_or(0);
            }
            if let Some(n) = before(line, " bytes stack frame") {
                found.stack = n;
                found.spill_stores = before(line, " bytes spill stores").unwrap_or(0);
                found.spill_loads = before(line, " bytes spill loads").unwrap_or(0);
            }
        }
        any.then_some(found)
    }
}

/// The number that stands right before some words.
fn before(line: &str, words: &str) -> Option<u32> {
    let head = &line[..line.find(words)?];
    let digits = head.rfind(|c: char| !c.is_ascii_digit()).map_or(head, |at| &head[at + 1..]);
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_in_the_log() {
        let log = "ptxas info    : 0 bytes gmem\nptxas info    : Compiling entry function 'k' for 'sm_90a'\n\
                   ptxas info    : Function properties for k\n\
                   \x20   16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n\
                   ptxas info    : Used 71 registers, used 1 barriers, 16 bytes cumulative stack size, 20480 bytes smem\n";
        let expected =
            Resources { registers: 71, spill_stores: 8, spill_loads: 12, stack: 16, shared: 20480 };
        assert_eq!(Resources::parse(log), Some(expected));
        assert_eq!(Resources::parse("nothing of the kind"), None);
    }
}
