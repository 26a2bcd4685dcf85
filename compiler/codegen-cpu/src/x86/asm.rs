//! `Asm`: a thin assembler over iced-x86 in which one text makes 256-bit and 512-bit code.
//!
//! Vector registers are numbers ([`V`]); every operation picks the VEX or EVEX encoding of the level. A broadcast memory
//! operand is part of the instruction with 512 bits, and a load into a register kept for it with 256. 32-bit constants
//! live in a pool behind the code, addressed through `r11`.

use crate::Target;
use iced_x86::code_asm::{
    AsmMemoryOperand, AsmRegister64, CodeAssembler, CodeLabel, dword_ptr, eax, k1, ptr, r11, xmm0, xmm1,
    ymm0, ymm1, zmm0,
};
use iced_x86::{Code, Instruction, MemoryOperand, Register};

/// How products of unsigned and signed bytes are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dot {
    /// `vpdpbusd` with 512 bits and embedded broadcast.
    Vnni512,
    /// `vpdpbusd` with 256 bits, AVX-VNNI.
    Vnni256,
    /// `vpsignb`, `vpmaddubsw`, `vpmaddwd`, `vpaddd` on magnitudes, with 256 bits.
    Maddubs,
}

/// What an inner function may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Level {
    pub(crate) dot: Dot,
    /// AMX bf16 tiles besides.
    pub(crate) amx: bool,
}

impl Level {
    /// The level of a target; `None` where Cranelift's own vectors are all there is.
    pub(crate) fn of(target: Target) -> Option<Level> {
        let (dot, amx) = match target {
            Target::X86_64V3 => (Dot::Maddubs, false),
            Target::X86_64V3Avxvnni => (Dot::Vnni256, false),
            Target::X86_64V4 => (Dot::Vnni512, false),
            Target::SapphireRapids => (Dot::Vnni512, true),
            Target::X86_64V2
            | Target::Aarch64
            | Target::Aarch64Dotprod
            | Target::Aarch64I8mm
            | Target::Riscv64 => return None,
        };
        Some(Level { dot, amx })
    }

    pub(crate) fn is_512(self) -> bool {
        self.dot == Dot::Vnni512
    }

    /// f32 lanes of a vector.
    pub(crate) fn lanes(self) -> usize {
        if self.is_512() { 16 } else { 8 }
    }

    /// Bytes of a vector.
    pub(crate) fn bytes(self) -> usize {
        4 * self.lanes()
    }

    /// Vectors of 32-bit lanes that one block of 16 channels makes.
    pub(crate) fn parts(self) -> usize {
        16 / self.lanes()
    }
}

/// A vector register by number: 0 to 31 with 512 bits, 0 to 14 with 256 (15 is kept for broadcasts).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct V(pub(crate) u8);

/// `[base + disp]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mem {
    base: AsmRegister64,
    disp: i64,
}

impl Mem {
    pub(crate) fn at(base: AsmRegister64, disp: usize) -> Mem {
        Mem { base, disp: disp as i64 }
    }

    /// `bytes` before an address.
    pub(crate) fn below(base: AsmRegister64, bytes: usize) -> Mem {
        Mem { base, disp: -(bytes as i64) }
    }

    /// The same, `bytes` further.
    pub(crate) fn plus(self, bytes: usize) -> Mem {
        Mem { disp: self.disp + bytes as i64, ..self }
    }

    /// A 32-bit operand of the typed assembler.
    pub(crate) fn dword(self) -> AsmMemoryOperand {
        dword_ptr(self.address())
    }

    /// For instructions of the typed assembler.
    pub(crate) fn address(self) -> AsmMemoryOperand {
        self.base + self.disp
    }

    fn operand(self) -> MemoryOperand {
        MemoryOperand::with_base_displ_size(Register::from(self.base), self.disp, u32::from(self.disp != 0))
    }
}

/// A last source operand.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Src {
    Reg(V),
    Mem(Mem),
    /// One 32-bit element in every lane.
    Bcst(Mem),
}

impl From<V> for Src {
    fn from(v: V) -> Src {
        Src::Reg(v)
    }
}

impl From<Mem> for Src {
    fn from(m: Mem) -> Src {
        Src::Mem(m)
    }
}

/// Codes of an operation with 256 and with 512 bits.
type Codes = (Code, Code);

/// The register that 256-bit code broadcasts into.
const BROADCAST: V = V(15);

pub(crate) struct Asm {
    pub(crate) a: CodeAssembler,
    pub(crate) level: Level,
    pool: Vec<u32>,
    pool_label: CodeLabel,
}

/// What the assembler says when an inner function is put together wrongly, which is a bug of ours.
pub(crate) type AsmResult<T> = Result<T, iced_x86::IcedError>;

macro_rules! three_operands {
    ($($(#[$doc:meta])* $name:ident $ymm:ident $zmm:ident;)*) => {
        $($(#[$doc])*
        pub(crate) fn $name(&mut self, to: V, a: V, b: impl Into<Src>) -> AsmResult<()> {
            self.op3((Code::$ymm, Code::$zmm), to, a, b.into())
        })*
    };
}

macro_rules! two_operands {
    ($($(#[$doc:meta])* $name:ident $ymm:ident $zmm:ident;)*) => {
        $($(#[$doc])*
        pub(crate) fn $name(&mut self, to: V, a: impl Into<Src>) -> AsmResult<()> {
            self.op2((Code::$ymm, Code::$zmm), to, a.into())
        })*
    };
}

macro_rules! shifts {
    ($($(#[$doc:meta])* $name:ident $ymm:ident $zmm:ident;)*) => {
        $($(#[$doc])*
        pub(crate) fn $name(&mut self, to: V, a: V, bits: u32) -> AsmResult<()> {
            let (code, to, a) = (self.pick((Code::$ymm, Code::$zmm)), self.register(to), self.register(a));
            self.a.add_instruction(Instruction::with3(code, to, a, bits)?)
        })*
    };
}

impl Asm {
    pub(crate) fn new(level: Level) -> AsmResult<Asm> {
        let mut a = CodeAssembler::new(64)?;
        let pool_label = a.create_label();
        a.lea(r11, ptr(pool_label))?;
        Ok(Asm { a, level, pool: Vec::new(), pool_label })
    }

    /// Ends the function: clean upper halves, return, constants.
    pub(crate) fn finish(mut self) -> AsmResult<Vec<u8>> {
        self.a.vzeroupper()?;
        self.a.ret()?;
        self.a.set_label(&mut self.pool_label)?;
        if self.pool.is_empty() {
            self.pool.push(0);
        }
        self.a.dd(&self.pool)?;
        self.a.assemble(0)
    }

    /// A 32-bit constant.
    pub(crate) fn constant(&mut self, bits: u32) -> Mem {
        let at = self.pool.iter().position(|c| *c == bits).unwrap_or_else(|| {
            self.pool.push(bits);
            self.pool.len() - 1
        });
        Mem::at(r11, 4 * at)
    }

    /// An f32 constant in every lane.
    pub(crate) fn float(&mut self, value: f32) -> Src {
        Src::Bcst(self.constant(value.to_bits()))
    }

    three_operands! {
        vaddps VEX_Vaddps_ymm_ymm_ymmm256 EVEX_Vaddps_zmm_k1z_zmm_zmmm512b32_er;
        vsubps VEX_Vsubps_ymm_ymm_ymmm256 EVEX_Vsubps_zmm_k1z_zmm_zmmm512b32_er;
        vmulps VEX_Vmulps_ymm_ymm_ymmm256 EVEX_Vmulps_zmm_k1z_zmm_zmmm512b32_er;
        vdivps VEX_Vdivps_ymm_ymm_ymmm256 EVEX_Vdivps_zmm_k1z_zmm_zmmm512b32_er;
        /// The second source where either is NaN.
        vmaxps VEX_Vmaxps_ymm_ymm_ymmm256 EVEX_Vmaxps_zmm_k1z_zmm_zmmm512b32_sae;
        /// The second source where either is NaN.
        vminps VEX_Vminps_ymm_ymm_ymmm256 EVEX_Vminps_zmm_k1z_zmm_zmmm512b32_sae;
        /// `to += a * b`.
        vfmadd231ps VEX_Vfmadd231ps_ymm_ymm_ymmm256 EVEX_Vfmadd231ps_zmm_k1z_zmm_zmmm512b32_er;
        /// `to = to * a + b`.
        vfmadd213ps VEX_Vfmadd213ps_ymm_ymm_ymmm256 EVEX_Vfmadd213ps_zmm_k1z_zmm_zmmm512b32_er;
        vpaddd VEX_Vpaddd_ymm_ymm_ymmm256 EVEX_Vpaddd_zmm_k1z_zmm_zmmm512b32;
        vpsubd VEX_Vpsubd_ymm_ymm_ymmm256 EVEX_Vpsubd_zmm_k1z_zmm_zmmm512b32;
        vpmaxsd VEX_Vpmaxsd_ymm_ymm_ymmm256 EVEX_Vpmaxsd_zmm_k1z_zmm_zmmm512b32;
        vpaddb VEX_Vpaddb_ymm_ymm_ymmm256 EVEX_Vpaddb_zmm_k1z_zmm_zmmm512;
        vpand VEX_Vpand_ymm_ymm_ymmm256 EVEX_Vpandd_zmm_k1z_zmm_zmmm512b32;
        vpor VEX_Vpor_ymm_ymm_ymmm256 EVEX_Vpord_zmm_k1z_zmm_zmmm512b32;
        vpxor VEX_Vpxor_ymm_ymm_ymmm256 EVEX_Vpxord_zmm_k1z_zmm_zmmm512b32;
        /// Within each 128 bits: bytes of `a` picked by `b`.
        vpshufb VEX_Vpshufb_ymm_ymm_ymmm256 EVEX_Vpshufb_zmm_k1z_zmm_zmmm512;
        /// Within each 128 bits: floats of `a` picked by the low two bits of `b`.
        vpermilps VEX_Vpermilps_ymm_ymm_ymmm256 EVEX_Vpermilps_zmm_k1z_zmm_zmmm512b32;
        /// Floats of `b` picked by the lowest bits of `a`: four of them with 512 bits, three with 256.
        vpermps VEX_Vpermps_ymm_ymm_ymmm256 EVEX_Vpermps_zmm_k1z_zmm_zmmm512b32;
        vpmaddubsw VEX_Vpmaddubsw_ymm_ymm_ymmm256 EVEX_Vpmaddubsw_zmm_k1z_zmm_zmmm512;
        vpmaddwd VEX_Vpmaddwd_ymm_ymm_ymmm256 EVEX_Vpmaddwd_zmm_k1z_zmm_zmmm512;
        /// `to += a (unsigned bytes) . b (signed bytes)`, four to a lane.
        vpdpbusd VEX_Vpdpbusd_ymm_ymm_ymmm256 EVEX_Vpdpbusd_zmm_k1z_zmm_zmmm512b32;
        /// `to += a . b` of signed 16-bit integers, two to a lane.
        vpdpwssd VEX_Vpdpwssd_ymm_ymm_ymmm256 EVEX_Vpdpwssd_zmm_k1z_zmm_zmmm512b32;
    }

    two_operands! {
        vmovups VEX_Vmovups_ymm_ymmm256 EVEX_Vmovups_zmm_k1z_zmmm512;
        vcvtdq2ps VEX_Vcvtdq2ps_ymm_ymmm256 EVEX_Vcvtdq2ps_zmm_k1z_zmmm512b32_er;
        /// To nearest even; the most negative integer where there is none.
        vcvtps2dq VEX_Vcvtps2dq_ymm_ymmm256 EVEX_Vcvtps2dq_zmm_k1z_zmmm512b32_er;
        vpabsb VEX_Vpabsb_ymm_ymmm256 EVEX_Vpabsb_zmm_k1z_zmmm512;
    }

    shifts! {
        vpsrld VEX_Vpsrld_ymm_ymm_imm8 EVEX_Vpsrld_zmm_k1z_zmmm512b32_imm8;
        vpsrad VEX_Vpsrad_ymm_ymm_imm8 EVEX_Vpsrad_zmm_k1z_zmmm512b32_imm8;
        vpslld VEX_Vpslld_ymm_ymm_imm8 EVEX_Vpslld_zmm_k1z_zmmm512b32_imm8;
        vpsrlw VEX_Vpsrlw_ymm_ymm_imm8 EVEX_Vpsrlw_zmm_k1z_zmmm512_imm8;
        vpsllw VEX_Vpsllw_ymm_ymm_imm8 EVEX_Vpsllw_zmm_k1z_zmmm512_imm8;
        vpsraw VEX_Vpsraw_ymm_ymm_imm8 EVEX_Vpsraw_zmm_k1z_zmmm512_imm8;
        /// Within each 128 bits: lanes picked by two bits each.
        pick_within_fours VEX_Vpshufd_ymm_ymmm256_imm8 EVEX_Vpshufd_zmm_k1z_zmmm512b32_imm8;
    }

    /// Bytes of `a` with the sign of those of `b`; only with 256 bits.
    pub(crate) fn vpsignb(&mut self, to: V, a: V, b: impl Into<Src>) -> AsmResult<()> {
        self.op3((Code::VEX_Vpsignb_ymm_ymm_ymmm256, Code::INVALID), to, a, b.into())
    }

    /// Floats to bf16: those of `low` in the lower half of the register, those of `high` in the upper; only with 512 bits.
    pub(crate) fn vcvtne2ps2bf16(&mut self, to: V, high: V, low: V) -> AsmResult<()> {
        self.op3((Code::INVALID, Code::EVEX_Vcvtne2ps2bf16_zmm_k1z_zmm_zmmm512b32), to, high, low.into())
    }

    /// Bytes of `b` where the highest bit of `mask`'s byte is set, else of `a`; only with 256 bits.
    pub(crate) fn vpblendvb(&mut self, to: V, a: V, b: V, mask: V) -> AsmResult<()> {
        let [to, a, b, mask] = [to, a, b, mask].map(|v| self.register(v));
        let code = Code::VEX_Vpblendvb_ymm_ymm_ymmm256_ymm;
        self.a.add_instruction(Instruction::with4(code, to, a, b, mask)?)
    }

    /// Which bytes of `a` and `b` have a bit in common; only with 512 bits.
    pub(crate) fn vptestmb(&mut self, to: Register, a: V, b: V) -> AsmResult<()> {
        let (a, b) = (self.register(a), self.register(b));
        self.a.add_instruction(Instruction::with3(Code::EVEX_Vptestmb_kr_k1_zmm_zmmm512, to, a, b)?)
    }

    /// [`Asm::vpshufb`] of the bytes that a mask selects, which leaves the others; only with 512 bits.
    pub(crate) fn vpshufb_masked(&mut self, to: V, mask: Register, a: V, b: V) -> AsmResult<()> {
        let [to, a, b] = [to, a, b].map(|v| self.register(v));
        let mut i = Instruction::with3(Code::EVEX_Vpshufb_zmm_k1z_zmm_zmmm512, to, a, b)?;
        i.set_op_mask(mask);
        self.a.add_instruction(i)
    }

    /// The bytes that a mask selects, which leaves the others; only with 512 bits.
    pub(crate) fn move_masked(&mut self, to: V, mask: Register, from: V) -> AsmResult<()> {
        let (to, from) = (self.register(to), self.register(from));
        let mut i = Instruction::with2(Code::EVEX_Vmovdqu8_zmm_k1z_zmmm512, to, from)?;
        i.set_op_mask(mask);
        self.a.add_instruction(i)
    }

    /// `to = to & mask | or`; only with 512 bits.
    pub(crate) fn and_or(&mut self, to: V, mask: V, or: V) -> AsmResult<()> {
        // Bit 4a + 2b + c of the truth table.
        const AND_OR: u32 = 0b1110_1010;
        let code = Code::EVEX_Vpternlogd_zmm_k1z_zmm_zmmm512b32_imm8;
        let (to, mask, or) = (self.register(to), self.register(mask), self.register(or));
        self.a.add_instruction(Instruction::with4(code, to, mask, or, AND_OR)?)
    }

    /// `to`'s bits where `mask` has ones, `other`'s elsewhere; only with 512 bits.
    pub(crate) fn select_bits(&mut self, to: V, mask: V, other: V) -> AsmResult<()> {
        // Bit 4a + 2b + c of the truth table.
        const B_OF_A_ELSE_C: u32 = 0b1110_0010;
        let code = Code::EVEX_Vpternlogd_zmm_k1z_zmm_zmmm512b32_imm8;
        let [to, mask, other] = [to, mask, other].map(|v| self.register(v));
        self.a.add_instruction(Instruction::with4(code, to, mask, other, B_OF_A_ELSE_C)?)
    }

    pub(crate) fn ldtilecfg(&mut self, from: Mem) -> AsmResult<()> {
        self.a.add_instruction(Instruction::with1(Code::VEX_Ldtilecfg_m512, from.operand())?)
    }

    /// Unsigned bytes from memory, one to a 32-bit lane.
    pub(crate) fn vpmovzxbd(&mut self, to: V, from: Mem) -> AsmResult<()> {
        self.op2((Code::VEX_Vpmovzxbd_ymm_xmmm64, Code::EVEX_Vpmovzxbd_zmm_k1z_xmmm128), to, from.into())
    }

    /// Signed bytes from memory, one to a 32-bit lane.
    pub(crate) fn vpmovsxbd(&mut self, to: V, from: Mem) -> AsmResult<()> {
        self.op2((Code::VEX_Vpmovsxbd_ymm_xmmm64, Code::EVEX_Vpmovsxbd_zmm_k1z_xmmm128), to, from.into())
    }

    /// Unsigned 16-bit integers from memory, one to a 32-bit lane.
    pub(crate) fn vpmovzxwd(&mut self, to: V, from: Mem) -> AsmResult<()> {
        self.op2((Code::VEX_Vpmovzxwd_ymm_xmmm128, Code::EVEX_Vpmovzxwd_zmm_k1z_ymmm256), to, from.into())
    }

    /// f16 from memory to f32.
    pub(crate) fn vcvtph2ps(&mut self, to: V, from: Mem) -> AsmResult<()> {
        let codes = (Code::VEX_Vcvtph2ps_ymm_xmmm128, Code::EVEX_Vcvtph2ps_zmm_k1z_ymmm256_sae);
        self.op2(codes, to, from.into())
    }

    /// f32 to f16 in memory, ties to even.
    pub(crate) fn vcvtps2ph(&mut self, to: Mem, from: V) -> AsmResult<()> {
        const NEAREST: u32 = 0;
        let code =
            self.pick((Code::VEX_Vcvtps2ph_xmmm128_ymm_imm8, Code::EVEX_Vcvtps2ph_ymmm256_k1z_zmm_imm8_sae));
        let from = self.register(from);
        self.a.add_instruction(Instruction::with3(code, to.operand(), from, NEAREST)?)
    }

    /// Lanes whose magnitude is below the positive float of these bits become zeros of the same sign.
    pub(crate) fn zero_below(&mut self, v: V, smallest: u32, [size, less]: [V; 2]) -> AsmResult<()> {
        const LESS: u32 = 1;
        let (magnitude, smallest) = (self.constant(0x7fff_ffff), self.constant(smallest));
        self.vpand(size, v, Src::Bcst(magnitude))?;
        if self.level.is_512() {
            let (v, size, sign) = (self.register(v), self.register(size), self.constant(0x8000_0000));
            let code = Code::EVEX_Vpcmpd_kr_k1_zmm_zmmm512b32_imm8;
            let mut i = Instruction::with4(code, Register::K1, size, smallest.operand(), LESS)?;
            i.set_is_broadcast(true);
            self.a.add_instruction(i)?;
            let mut i = Instruction::with3(Code::EVEX_Vpandd_zmm_k1z_zmm_zmmm512b32, v, v, sign.operand())?;
            i.set_is_broadcast(true);
            i.set_op_mask(Register::K1);
            return self.a.add_instruction(i);
        }
        self.broadcast(less, smallest)?;
        let (l, n, v) = (self.register(less), self.register(size), self.register(v));
        self.a.add_instruction(Instruction::with3(Code::VEX_Vpcmpgtd_ymm_ymm_ymmm256, l, l, n)?)?;
        self.vpand(less, less, Src::Bcst(magnitude))?;
        self.a.add_instruction(Instruction::with3(Code::VEX_Vpandn_ymm_ymm_ymmm256, v, l, v)?)
    }

    /// To the nearest integer, ties to even.
    pub(crate) fn vroundps(&mut self, to: V, a: V) -> AsmResult<()> {
        let codes = (Code::VEX_Vroundps_ymm_ymmm256_imm8, Code::EVEX_Vrndscaleps_zmm_k1z_zmmm512b32_imm8_sae);
        let (code, to, a) = (self.pick(codes), self.register(to), self.register(a));
        self.a.add_instruction(Instruction::with3(code, to, a, 0u32)?)
    }

    /// `a * 2^b` for integers b; only with 512 bits.
    pub(crate) fn vscalefps(&mut self, to: V, a: V, b: V) -> AsmResult<()> {
        self.op3((Code::INVALID, Code::EVEX_Vscalefps_zmm_k1z_zmm_zmmm512b32_er), to, a, b.into())
    }

    /// One 32-bit element of memory in every lane.
    pub(crate) fn broadcast(&mut self, to: V, from: Mem) -> AsmResult<()> {
        self.op2((Code::VEX_Vbroadcastss_ymm_m32, Code::EVEX_Vbroadcastss_zmm_k1z_xmmm32), to, from.into())
    }

    /// 16 bytes of memory in every 128 bits.
    pub(crate) fn broadcast16(&mut self, to: V, from: Mem) -> AsmResult<()> {
        self.op2(
            (Code::VEX_Vbroadcasti128_ymm_m128, Code::EVEX_Vbroadcasti32x4_zmm_k1z_m128),
            to,
            from.into(),
        )
    }

    pub(crate) fn zero(&mut self, v: V) -> AsmResult<()> {
        self.vpxor(v, v, v)
    }

    pub(crate) fn store(&mut self, to: Mem, from: V) -> AsmResult<()> {
        let code = self.pick((Code::VEX_Vmovups_ymmm256_ymm, Code::EVEX_Vmovups_zmmm512_k1z_zmm));
        let from = self.register(from);
        self.a.add_instruction(Instruction::with2(code, to.operand(), from)?)
    }

    /// A loop that runs `body` while the counter, decremented by `step` after each turn, is at least `step`... the
    /// counter must be positive and a multiple of `step`.
    pub(crate) fn repeat(
        &mut self,
        counter: AsmRegister64,
        step: i32,
        body: impl FnOnce(&mut Asm) -> AsmResult<()>,
    ) -> AsmResult<()> {
        let mut top = self.a.create_label();
        self.a.set_label(&mut top)?;
        body(self)?;
        self.a.sub(counter, step)?;
        self.a.jg(top)
    }

    /// xmm`from`'s first element in every lane.
    pub(crate) fn splat(&mut self, to: V, from: V) -> AsmResult<()> {
        let codes = (Code::VEX_Vbroadcastss_ymm_xmm, Code::EVEX_Vbroadcastss_zmm_k1z_xmmm32);
        let (code, to) = (self.pick(codes), self.register(to));
        self.a.add_instruction(Instruction::with2(code, to, Register::XMM0 + u32::from(from.0))?)
    }

    /// The sum of V0's lanes in xmm0's first: halves are added until one is left. Uses V1.
    pub(crate) fn reduce_add(&mut self) -> AsmResult<()> {
        self.reduce(|a| a.vaddps(ymm0, ymm0, ymm1), |a| a.vaddps(xmm0, xmm0, xmm1))
    }

    /// The largest of V0's lanes in xmm0's first. Uses V1.
    pub(crate) fn reduce_max(&mut self) -> AsmResult<()> {
        self.reduce(|a| a.vmaxps(ymm0, ymm0, ymm1), |a| a.vmaxps(xmm0, xmm0, xmm1))
    }

    /// The sum of V0's integers in xmm0's first. Uses V1.
    pub(crate) fn reduce_add_integers(&mut self) -> AsmResult<()> {
        self.reduce(|a| a.vpaddd(ymm0, ymm0, ymm1), |a| a.vpaddd(xmm0, xmm0, xmm1))
    }

    fn reduce(
        &mut self,
        halves: impl Fn(&mut CodeAssembler) -> AsmResult<()>,
        rest: impl Fn(&mut CodeAssembler) -> AsmResult<()>,
    ) -> AsmResult<()> {
        if self.level.is_512() {
            self.a.vextractf64x4(ymm1, zmm0, 1)?;
            halves(&mut self.a)?;
        }
        self.a.vextractf128(xmm1, ymm0, 1)?;
        rest(&mut self.a)?;
        self.a.vpermilps(xmm1, xmm0, 0x4e)?;
        rest(&mut self.a)?;
        self.a.vpermilps(xmm1, xmm0, 0xb1)?;
        rest(&mut self.a)
    }

    /// A number other than zero in eax when a lane of `v` is NaN. Uses `v`.
    pub(crate) fn any_nan(&mut self, v: V) -> AsmResult<()> {
        const UNORDERED: u32 = 3;
        let register = self.register(v);
        if self.level.is_512() {
            let code = Code::EVEX_Vcmpps_kr_k1_zmm_zmmm512b32_imm8_sae;
            self.a.add_instruction(Instruction::with4(code, Register::K1, register, register, UNORDERED)?)?;
            self.a.kmovw(eax, k1)
        } else {
            let code = Code::VEX_Vcmpps_ymm_ymm_ymmm256_imm8;
            self.a.add_instruction(Instruction::with4(code, register, register, register, UNORDERED)?)?;
            self.a.add_instruction(Instruction::with2(Code::VEX_Vmovmskps_r32_ymm, Register::EAX, register)?)
        }
    }

    /// In lanes where `x` is 0, `v` becomes 0. Uses `x` with 256 bits.
    pub(crate) fn zero_where_zero(&mut self, v: V, x: V) -> AsmResult<()> {
        const NOT_EQUAL: u32 = 4;
        let (zero, v, x) = (self.constant(0), self.register(v), self.register(x));
        if self.level.is_512() {
            let code = Code::EVEX_Vcmpps_kr_k1_zmm_zmmm512b32_imm8_sae;
            let mut i = Instruction::with4(code, Register::K1, x, zero.operand(), NOT_EQUAL)?;
            i.set_is_broadcast(true);
            self.a.add_instruction(i)?;
            let mut i = Instruction::with2(Code::EVEX_Vmovaps_zmm_k1z_zmmm512, v, v)?;
            i.set_op_mask(Register::K1);
            i.set_zeroing_masking(true);
            return self.a.add_instruction(i);
        }
        self.broadcast(BROADCAST, zero)?;
        let broadcast = self.register(BROADCAST);
        let compare = Code::VEX_Vcmpps_ymm_ymm_ymmm256_imm8;
        self.a.add_instruction(Instruction::with4(compare, x, x, broadcast, NOT_EQUAL)?)?;
        self.a.add_instruction(Instruction::with3(Code::VEX_Vandps_ymm_ymm_ymmm256, v, v, x)?)
    }

    /// In lanes where `x` is below `low`, `v` becomes 0, and where it is above `high`, infinite; only with 256 bits.
    pub(crate) fn keep_within(&mut self, v: V, x: V, low: Mem, high: Mem) -> AsmResult<()> {
        const LESS: u32 = 1;
        const GREATER: u32 = 14;
        let (v, x) = (self.register(v), self.register(x));
        let compare = Code::VEX_Vcmpps_ymm_ymm_ymmm256_imm8;
        let broadcast = self.register(BROADCAST);
        self.broadcast(BROADCAST, low)?;
        self.a.add_instruction(Instruction::with4(compare, broadcast, x, broadcast, LESS)?)?;
        self.a.add_instruction(Instruction::with3(Code::VEX_Vandnps_ymm_ymm_ymmm256, v, broadcast, v)?)?;
        self.broadcast(BROADCAST, high)?;
        self.a.add_instruction(Instruction::with4(compare, broadcast, x, broadcast, GREATER)?)?;
        let infinities = self.constants(&[f32::INFINITY.to_bits(); 8]);
        let code = Code::VEX_Vblendvps_ymm_ymm_ymmm256_ymm;
        self.a.add_instruction(Instruction::with4(code, v, v, infinities.operand(), broadcast)?)
    }

    /// The 32 integers of neighbouring registers from `first` on, each in the range of a byte, to 32 bytes of memory.
    pub(crate) fn store_bytes(&mut self, to: AsmRegister64, first: V) -> AsmResult<()> {
        if self.level.is_512() {
            for i in 0..2u8 {
                let (to, from) = (Mem::at(to, 16 * usize::from(i)), self.register(V(first.0 + i)));
                let code = Code::EVEX_Vpmovdb_xmmm128_k1z_zmm;
                self.a.add_instruction(Instruction::with2(code, to.operand(), from)?)?;
            }
            return Ok(());
        }
        // Packing works within halves; the dwords are put in order at the end.
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| self.register(V(first.0 + i)));
        let words = Code::VEX_Vpackssdw_ymm_ymm_ymmm256;
        self.a.add_instruction(Instruction::with3(words, a, a, b)?)?;
        self.a.add_instruction(Instruction::with3(words, c, c, d)?)?;
        self.a.add_instruction(Instruction::with3(Code::VEX_Vpacksswb_ymm_ymm_ymmm256, a, a, c)?)?;
        let order = self.constants(&[0, 4, 1, 5, 2, 6, 3, 7]);
        self.vmovups(V(first.0 + 1), order)?;
        self.a.add_instruction(Instruction::with3(Code::VEX_Vpermd_ymm_ymm_ymmm256, a, b, a)?)?;
        self.store(Mem::at(to, 0), first)
    }

    /// 16 integers of neighbouring registers from `first` on, each in the range of 16 bits, to 32 bytes of memory.
    pub(crate) fn store_words(&mut self, to: Mem, first: V) -> AsmResult<()> {
        if self.level.is_512() {
            let code = Code::EVEX_Vpmovsdw_ymmm256_k1z_zmm;
            let from = self.register(first);
            return self.a.add_instruction(Instruction::with2(code, to.operand(), from)?);
        }
        let (a, b) = (self.register(first), self.register(V(first.0 + 1)));
        self.a.add_instruction(Instruction::with3(Code::VEX_Vpackssdw_ymm_ymm_ymmm256, a, a, b)?)?;
        // Packing works within halves.
        let code = Code::VEX_Vpermq_ymm_ymmm256_imm8;
        self.a.add_instruction(Instruction::with3(code, a, a, 0b11_01_10_00u32)?)?;
        self.store(to, first)
    }

    /// Constants that lie side by side.
    pub(crate) fn constants(&mut self, bits: &[u32]) -> Mem {
        let at = self.pool.windows(bits.len()).position(|w| w == bits).unwrap_or_else(|| {
            self.pool.extend_from_slice(bits);
            self.pool.len() - bits.len()
        });
        Mem::at(r11, 4 * at)
    }

    fn op3(&mut self, codes: Codes, to: V, a: V, b: Src) -> AsmResult<()> {
        let b = self.source(b)?;
        let (code, to, a) = (self.pick(codes), self.register(to), self.register(a));
        let instruction = match b {
            Src::Reg(b) => Instruction::with3(code, to, a, self.register(b))?,
            Src::Mem(m) => Instruction::with3(code, to, a, m.operand())?,
            Src::Bcst(m) => {
                let mut i = Instruction::with3(code, to, a, m.operand())?;
                i.set_is_broadcast(true);
                i
            }
        };
        self.a.add_instruction(instruction)
    }

    fn op2(&mut self, codes: Codes, to: V, a: Src) -> AsmResult<()> {
        let a = self.source(a)?;
        let (code, to) = (self.pick(codes), self.register(to));
        let instruction = match a {
            Src::Reg(a) => Instruction::with2(code, to, self.register(a))?,
            Src::Mem(m) => Instruction::with2(code, to, m.operand())?,
            Src::Bcst(m) => {
                let mut i = Instruction::with2(code, to, m.operand())?;
                i.set_is_broadcast(true);
                i
            }
        };
        self.a.add_instruction(instruction)
    }

    /// With 256 bits a broadcast operand becomes a register.
    fn source(&mut self, src: Src) -> AsmResult<Src> {
        match src {
            Src::Bcst(m) if !self.level.is_512() => {
                self.broadcast(BROADCAST, m)?;
                Ok(Src::Reg(BROADCAST))
            }
            src => Ok(src),
        }
    }

    fn pick(&self, codes: Codes) -> Code {
        if self.level.is_512() { codes.1 } else { codes.0 }
    }

    fn register(&self, v: V) -> Register {
        let first = if self.level.is_512() { Register::ZMM0 } else { Register::YMM0 };
        debug_assert!(u32::from(v.0) < if self.level.is_512() { 32 } else { 16 }, "no register {}", v.0);
        first + u32::from(v.0)
    }
}
