//! Inner functions of x86 kernels, assembled by hand with vectors wider than Cranelift lowers.
//!
//! A kernel's outer loops, its prologue and epilogue are Cranelift code ([`crate::lanes`]); what costs time is an inner
//! function that it calls ([`crate::lanes::Lanes::call_inner`]). Inner functions follow the System V convention, keep
//! no state, call nothing, and leave the upper halves of vector registers clean.
//!
//! They are written once over a [`Level`]: 256-bit or 512-bit registers, and one of three ways to multiply bytes.

mod amx;
mod asm;
mod attention;
mod attention_bytes;
mod float;
mod heads;
mod int;
mod math;
pub(crate) mod rows;

pub(crate) use amx::{BLOCK_ROWS, TILE, TILE_ROWS, TileKernel};
pub(crate) use asm::{Asm, Dot, Level, Mem, Src, V};
pub(crate) use attention::AttentionKernel;
pub(crate) use float::FloatKernel;
pub(crate) use heads::HeadKernel;
pub(crate) use int::{IntKernel, Span};

/// Instructions of an inner function, one a line behind its offset.
pub(crate) fn disassemble(code: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    let mut formatter = iced_x86::FastFormatter::new();
    let mut decoder = iced_x86::Decoder::new(64, code, iced_x86::DecoderOptions::NONE);
    while decoder.can_decode() {
        let instruction = decoder.decode();
        // Writing to a string does not fail.
        let _ = write!(text, "{:016X} ", instruction.ip());
        formatter.format(&instruction, &mut text);
        text.push('\n');
        // Constants follow.
        if instruction.mnemonic() == iced_x86::Mnemonic::Ret {
            break;
        }
    }
    text
}
