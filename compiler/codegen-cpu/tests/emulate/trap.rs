//! The SIGILL handler: the instruction at the fault, its operands in the signal's context, and on behind it.

use super::{Products, TileFile, vpdpbusd};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use std::cell::RefCell;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Once, OnceLock};

/// Instructions carried out.
pub(crate) static COUNT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static TILES: RefCell<TileFile> = const { RefCell::new(TileFile::INITIAL) };
}

/// Installs the handler for this process.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // The decoder makes its tables at first use, which should not be in the handler.
        let _ = Decoder::new(64, &[0x90], DecoderOptions::NONE).decode();
        let _ = offsets();
        // SAFETY: the handler has the signature that SA_SIGINFO asks for; all fields not set are valid as zeros.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_invalid_opcode;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(
                libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()),
                0,
                "no handler for SIGILL"
            );
        }
    });
}

extern "C" fn on_invalid_opcode(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let mut context = Context(context.cast());
    let mut carried_out = 0;
    // What follows often needs emulation too, or loads operands of what does; taking it along saves a signal.
    loop {
        let instruction = context.instruction();
        if context.execute(&instruction) {
            carried_out += 1;
        } else if carried_out == 0 || !context.load(&instruction) {
            break;
        }
        context.set_ip(instruction.next_ip());
    }
    COUNT.fetch_add(carried_out, Ordering::Relaxed);
    if carried_out == 0 {
        fail(&context.instruction(), "not an instruction that is emulated");
    }
}

fn fail(instruction: &Instruction, problem: &str) -> ! {
    let _ = writeln!(std::io::stderr(), "invalid opcode {:?}: {problem}", instruction.code());
    std::process::abort();
}

/// Registers at the fault.
struct Context(*mut libc::ucontext_t);

/// Layout of the register area: the legacy part, then the header at 512, then each state where CPUID says.
const XMM: usize = 160;
const MAGIC: usize = 464;
const STATES: usize = 512;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
const ZMM_HIGH: u64 = 1 << 6;

/// Where the states of AVX and of the upper halves of ZMM registers stand in the register area. Asked for once: virtual
/// machines take long to answer.
static OFFSETS: OnceLock<[usize; 2]> = OnceLock::new();

fn offsets() -> [usize; 2] {
    *OFFSETS.get_or_init(|| [2, 6].map(|state| std::arch::x86_64::__cpuid_count(0xd, state).ebx as usize))
}

impl Context {
    fn general(&self, register: Register) -> u64 {
        let slot = match register {
            Register::None => return 0,
            Register::RAX => libc::REG_RAX,
            Register::RBX => libc::REG_RBX,
            Register::RCX => libc::REG_RCX,
            Register::RDX => libc::REG_RDX,
            Register::RSI => libc::REG_RSI,
            Register::RDI => libc::REG_RDI,
            Register::RBP => libc::REG_RBP,
            Register::RSP => libc::REG_RSP,
            Register::R8 => libc::REG_R8,
            Register::R9 => libc::REG_R9,
            Register::R10 => libc::REG_R10,
            Register::R11 => libc::REG_R11,
            Register::R12 => libc::REG_R12,
            Register::R13 => libc::REG_R13,
            Register::R14 => libc::REG_R14,
            Register::R15 => libc::REG_R15,
            other => unreachable!("{other:?} in a 64-bit address"),
        };
        // SAFETY: the kernel gave a whole context.
        unsafe { (*self.0).uc_mcontext.gregs[slot as usize] as u64 }
    }

    fn set_ip(&mut self, ip: u64) {
        // SAFETY: the kernel gave a whole context, which it takes back.
        unsafe { (*self.0).uc_mcontext.gregs[libc::REG_RIP as usize] = ip as i64 };
    }

    fn instruction(&self) -> Instruction {
        // SAFETY: code that is being executed is readable, and an inner function goes on for the 15 bytes of the longest
        // instruction behind any that is emulated: its end and its constants.
        let (ip, bytes) = unsafe {
            let ip = (*self.0).uc_mcontext.gregs[libc::REG_RIP as usize] as u64;
            (ip, *(ip as *const [u8; 15]))
        };
        Decoder::with_ip(64, &bytes, ip, DecoderOptions::NONE).decode()
    }

    /// Address of a memory operand, without the index.
    fn base(&self, i: &Instruction) -> u64 {
        if i.is_ip_rel_memory_operand() {
            return i.ip_rel_memory_address();
        }
        self.general(i.memory_base()).wrapping_add(i.memory_displacement64())
    }

    /// The scaled index of a memory operand.
    fn index(&self, i: &Instruction) -> u64 {
        self.general(i.memory_index()).wrapping_mul(u64::from(i.memory_index_scale()))
    }

    /// Carries an instruction out; `false` if it is none of those that are emulated.
    fn execute(&mut self, i: &Instruction) -> bool {
        let outcome = match i.code() {
            Code::VEX_Vpdpbusd_ymm_ymm_ymmm256 => {
                self.dot(i);
                Ok(())
            }
            _ => match self.tile_instruction(i) {
                Some(outcome) => outcome,
                None => return false,
            },
        };
        if let Err(problem) = outcome {
            fail(i, &problem);
        }
        true
    }

    /// Carries out a plain load of a vector register; `false` if it is none.
    fn load(&mut self, i: &Instruction) -> bool {
        let address = || self.base(i).wrapping_add(self.index(i)) as *const u8;
        let value = match i.code() {
            // SAFETY: these read what the instructions would have.
            Code::VEX_Vmovups_ymm_ymmm256 if i.op1_kind() == OpKind::Memory => unsafe {
                address().cast::<[u8; 32]>().read_unaligned()
            },
            Code::VEX_Vbroadcastss_ymm_m32 => {
                // SAFETY: as above.
                let element = unsafe { address().cast::<[u8; 4]>().read_unaligned() };
                std::array::from_fn(|b| element[b % 4])
            }
            _ => return false,
        };
        self.set_ymm(i.op0_register() as usize - Register::YMM0 as usize, value);
        true
    }

    fn dot(&mut self, i: &Instruction) {
        let number = |op: u32| i.op_register(op) as usize - Register::YMM0 as usize;
        let b = if i.op2_kind() == OpKind::Memory {
            let address = self.base(i).wrapping_add(self.index(i));
            // SAFETY: what the instruction would have read.
            unsafe { (address as *const [u8; 32]).read_unaligned() }
        } else {
            self.ymm(number(2))
        };
        let sum = vpdpbusd(self.ymm(number(0)), self.ymm(number(1)), b);
        self.set_ymm(number(0), sum);
    }

    /// The register area.
    fn area(&self) -> *mut u8 {
        // SAFETY: the kernel gave a whole context.
        unsafe { (*self.0).uc_mcontext.fpregs.cast() }
    }

    /// Bits of the states that the area holds; those without a bit are as after a reset.
    fn states(&self) -> *mut u64 {
        const EXTENDED: u32 = 0x4650_5853;
        // SAFETY: the legacy area holds 512 bytes, and the header follows where the magic number says so.
        unsafe {
            assert_eq!(self.area().add(MAGIC).cast::<u32>().read(), EXTENDED, "a context without AVX state");
            self.area().add(STATES).cast()
        }
    }

    fn ymm(&self, number: usize) -> [u8; 32] {
        let mut value = [0; 32];
        // SAFETY: the header is part of the area.
        let states = unsafe { self.states().read() };
        let halves = [(SSE, XMM), (AVX, offsets()[0])];
        for (half, (state, offset)) in value.chunks_mut(16).zip(halves) {
            if states & state != 0 {
                // SAFETY: 16 registers of 16 bytes stand at either offset.
                unsafe { half.copy_from_slice(&*self.area().add(offset + 16 * number).cast::<[u8; 16]>()) };
            }
        }
        value
    }

    /// With VEX encoding: the upper half of the 512-bit register becomes zero.
    fn set_ymm(&mut self, number: usize, value: [u8; 32]) {
        let halves = [(SSE, XMM), (AVX, offsets()[0])];
        for (half, (state, offset)) in value.chunks(16).zip(halves) {
            // SAFETY: 16 registers of 16 bytes stand at either offset.
            unsafe {
                if *self.states() & state == 0 {
                    self.area().add(offset).cast::<[u8; 256]>().write([0; 256]);
                    *self.states() |= state;
                }
                self.area().add(offset + 16 * number).copy_from_nonoverlapping(half.as_ptr(), 16);
            }
        }
        // SAFETY: with that bit 16 upper halves of 32 bytes stand there.
        unsafe {
            if *self.states() & ZMM_HIGH != 0 {
                self.area().add(offsets()[1] + 32 * number).cast::<[u8; 32]>().write([0; 32]);
            }
        }
    }

    /// `None` for everything but AMX.
    fn tile_instruction(&self, i: &Instruction) -> Option<Result<(), String>> {
        let tile = |op: u32| i.op_register(op) as usize - Register::TMM0 as usize;
        let base = self.base(i);
        let stride = self.index(i);
        let row = |r: usize| base.wrapping_add(stride.wrapping_mul(r as u64));
        TILES.with_borrow_mut(|tiles| {
            let mut multiply = |products| tiles.multiply(products, tile(0), tile(1), tile(2));
            Some(match i.mnemonic() {
                // SAFETY: these read and write what the instructions would have.
                Mnemonic::Ldtilecfg => tiles.configure(unsafe { &*(base as *const [u8; 64]) }),
                Mnemonic::Sttilecfg => {
                    // SAFETY: as above.
                    unsafe { (base as *mut [u8; 64]).write_unaligned(tiles.configuration()) };
                    Ok(())
                }
                Mnemonic::Tileloadd | Mnemonic::Tileloaddt1 => tiles.load(tile(0), |r, bytes| {
                    // SAFETY: as above.
                    unsafe { (row(r) as *const u8).copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
                }),
                Mnemonic::Tilestored => tiles.store(tile(1), |r, bytes| {
                    // SAFETY: as above.
                    unsafe { (row(r) as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
                }),
                Mnemonic::Tilezero => tiles.zero(tile(0)),
                Mnemonic::Tilerelease => {
                    tiles.release();
                    Ok(())
                }
                Mnemonic::Tdpbf16ps => multiply(Products::Bf16),
                Mnemonic::Tdpbssd => multiply(Products::Bytes(true, true)),
                Mnemonic::Tdpbsud => multiply(Products::Bytes(true, false)),
                Mnemonic::Tdpbusd => multiply(Products::Bytes(false, true)),
                Mnemonic::Tdpbuud => multiply(Products::Bytes(false, false)),
                _ => return None,
            })
        })
    }
}

/// Whether this thread's tiles are configured: kernels must leave them released.
pub(crate) fn tiles_in_use() -> bool {
    TILES.with_borrow(TileFile::is_configured)
}
