//! What happens to rows before and after matrix products, 256 or 512 bits wide: normalisation, quantization to int8,
//! SwiGLU, residual addition.
//!
//! Int8 rows are those of [`ActInt8Layout`], in the arithmetic its contract gives, so that codes are the reference's bit
//! for bit.

use super::asm::AsmResult;
use super::{Asm, Level, Mem, Src, V};
use attar_kernel::ActInt8Layout;
use iced_x86::code_asm::{
    AsmRegister64, dword_ptr, eax, ptr, r8, rax, rcx, rdi, rdx, rsi, xmm0, xmm1, xmm2, xmm3, xmm4,
};

const GROUP: usize = ActInt8Layout::GROUP;

/// Registers 0 to 4 are scratch of [`quantize_group`]; a group's values lie here.
pub(super) fn value(i: usize) -> V {
    V(5 + i as u8)
}

/// RMSNorm (with `eps`) and quantization of one row. Arguments: x f32 `[dim]`, gain f32 `[dim]` (when there is one), out
/// int8 row.
pub(crate) fn norm_quantize(level: Level, dim: usize, eps: Option<f32>, gain: bool) -> AsmResult<Vec<u8>> {
    let mut s = Asm::new(level)?;
    let layout = ActInt8Layout::new(dim);
    let vectors = GROUP / level.lanes();
    let inverse = V(9);
    if let Some(eps) = eps {
        inverse_rms(&mut s, dim, eps)?;
        s.broadcast(inverse, Mem::below(iced_x86::code_asm::rsp, 8))?;
    }
    s.a.lea(r8, ptr(rdx + layout.scales_offset as i32))?;
    s.a.mov(rcx, layout.groups as i64)?;
    s.repeat(rcx, 1, |s| {
        for i in 0..vectors {
            let at = i * level.bytes();
            if eps.is_some() {
                s.vmulps(value(i), inverse, Mem::at(rdi, at))?;
            } else {
                s.vmovups(value(i), Mem::at(rdi, at))?;
            }
            if gain {
                s.vmulps(value(i), value(i), Mem::at(rsi, at))?;
            }
        }
        quantize_group(s, rdx, r8, &layout)?;
        s.a.add(rdi, 4 * GROUP as i32)?;
        if gain {
            s.a.add(rsi, 4 * GROUP as i32)?;
        }
        s.a.add(rdx, GROUP as i32)?;
        s.a.add(r8, 4)
    })?;
    s.finish()
}

/// `1 / sqrt(mean(x^2) + eps)` of the row at rdi, left 8 bytes below the stack pointer. `dim` is a multiple of 32.
fn inverse_rms(s: &mut Asm, dim: usize, eps: f32) -> AsmResult<()> {
    let lanes = s.level.lanes();
    let sums = [V(5), V(6)];
    for v in sums {
        s.zero(v)?;
    }
    s.a.mov(rax, rdi)?;
    s.a.mov(rcx, (dim / (2 * lanes)) as i64)?;
    s.repeat(rcx, 1, |s| {
        for (i, sum) in sums.into_iter().enumerate() {
            s.vmovups(V(7), Mem::at(rax, i * s.level.bytes()))?;
            s.vfmadd231ps(sum, V(7), V(7))?;
        }
        s.a.add(rax, 2 * s.level.bytes() as i32)
    })?;
    s.vaddps(V(0), sums[0], sums[1])?;
    s.reduce_add()?;
    let (count, eps, one) =
        (s.constant((dim as f32).to_bits()), s.constant(eps.to_bits()), s.constant(1f32.to_bits()));
    s.a.vdivss(xmm0, xmm0, dword_ptr(count.address()))?;
    s.a.vaddss(xmm0, xmm0, dword_ptr(eps.address()))?;
    s.a.vsqrtss(xmm0, xmm0, xmm0)?;
    s.a.vmovss(xmm1, dword_ptr(one.address()))?;
    s.a.vdivss(xmm1, xmm1, xmm0)?;
    s.a.vmovss(dword_ptr(iced_x86::code_asm::rsp - 8), xmm1)
}

/// Quantizes the group in [`value`] registers: 32 codes to `codes`, its scale to `scale`, the codes' sum as far behind it
/// as the layout says. Uses registers 0 to 4 and the values.
pub(super) fn quantize_group(
    s: &mut Asm,
    codes: AsmRegister64,
    scale: AsmRegister64,
    layout: &ActInt8Layout,
) -> AsmResult<()> {
    let vectors = GROUP / s.level.lanes();
    let (largest, poison, size, zero) = (V(0), V(1), V(2), V(3));
    let magnitude = s.constant(0x7fff_ffff);
    s.zero(zero)?;
    s.vmulps(poison, value(0), zero)?;
    s.vpand(size, value(0), Src::Bcst(magnitude))?;
    // The second source where the first is NaN: NaN does not count.
    s.vmaxps(largest, size, zero)?;
    for i in 1..vectors {
        s.vfmadd231ps(poison, value(i), zero)?;
        s.vpand(size, value(i), Src::Bcst(magnitude))?;
        s.vmaxps(largest, size, largest)?;
    }
    // All ones in eax where any value is NaN or infinite.
    s.any_nan(poison)?;
    s.a.neg(eax)?;
    s.a.sbb(eax, eax)?;
    s.a.and(eax, 0x7fc0_0000)?;
    s.reduce_max()?;
    let limit = s.constant(127f32.to_bits());
    s.a.vmovd(xmm4, eax)?;
    s.a.vmovss(xmm1, dword_ptr(limit.address()))?;
    s.a.vdivss(xmm2, xmm0, xmm1)?;
    s.a.vaddss(xmm2, xmm2, xmm4)?;
    s.a.vmovss(dword_ptr(scale), xmm2)?;
    // Division by zero gives an infinity that the comparison takes away.
    s.a.vdivss(xmm2, xmm1, xmm0)?;
    s.a.vcmpps(xmm0, xmm3, xmm0, 1)?;
    s.a.vandps(xmm2, xmm2, xmm0)?;
    s.splat(V(4), V(2))?;
    let (low, high) = (s.float(-127.0), s.float(127.0));
    for i in 0..vectors {
        s.vmulps(value(i), value(i), V(4))?;
        s.vmaxps(value(i), value(i), low)?;
        s.vminps(value(i), value(i), high)?;
        s.vcvtps2dq(value(i), value(i))?;
    }
    s.vpaddd(V(0), value(0), value(1))?;
    for i in 2..vectors {
        s.vpaddd(V(0), V(0), value(i))?;
    }
    s.reduce_add_integers()?;
    s.a.vmovd(dword_ptr(scale + (layout.sums_offset - layout.scales_offset) as i32), xmm0)?;
    s.store_bytes(codes, value(0))
}

/// Rows of SwiGLU over 32 outputs, quantized: sums hold 16 gates, their 16 ups, and again. Arguments: sums, codes of
/// the first row's group, its scale, rows.
pub(crate) fn swiglu_quantize(
    level: Level,
    layout: &ActInt8Layout,
    sums_stride: usize,
) -> AsmResult<Vec<u8>> {
    let mut s = Asm::new(level)?;
    let vectors = GROUP / level.lanes();
    let gate = |i: usize| i / level.parts() * 128 + i % level.parts() * level.bytes();
    // Two walks over the rows: each row is a long chain of operations, and a processor looks only so many ahead.
    s.a.mov(r8, rdi)?;
    s.a.mov(rax, rcx)?;
    s.repeat(rax, 1, |s| {
        for i in 0..vectors {
            s.vmovups(value(i), Mem::at(r8, gate(i)))?;
            s.silu(value(i), V(9), [V(0), V(1), V(2), V(3)])?;
            s.vmulps(value(i), value(i), Mem::at(r8, gate(i) + 64))?;
            s.store(Mem::at(r8, gate(i)), value(i))?;
        }
        s.a.add(r8, sums_stride as i32)
    })?;
    s.repeat(rcx, 1, |s| {
        for i in 0..vectors {
            s.vmovups(value(i), Mem::at(rdi, gate(i)))?;
        }
        quantize_group(s, rsi, rdx, layout)?;
        s.a.add(rdi, sums_stride as i32)?;
        s.a.add(rsi, layout.stride as i32)?;
        s.a.add(rdx, layout.stride as i32)
    })?;
    s.finish()
}

/// Stores rows of sums, with a residual added where there is one. Arguments: sums, residual (at the item's columns, or
/// anything), out (likewise), rows. `width` is that of the matrix, `blocks` those of the item.
pub(crate) fn store_rows(
    level: Level,
    width: usize,
    blocks: usize,
    residual: bool,
    sums_stride: usize,
) -> AsmResult<Vec<u8>> {
    let mut s = Asm::new(level)?;
    s.repeat(rcx, 1, |s| {
        for v in 0..blocks * level.parts() {
            let at = v * level.bytes();
            s.vmovups(V(0), Mem::at(rdi, at))?;
            if residual {
                s.vaddps(V(0), V(0), Mem::at(rsi, at))?;
            }
            s.store(Mem::at(rdx, at), V(0))?;
        }
        s.a.add(rdi, sums_stride as i32)?;
        if residual {
            s.a.add(rsi, (width * 4) as i32)?;
        }
        s.a.add(rdx, (width * 4) as i32)
    })?;
    s.finish()
}
