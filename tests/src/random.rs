//! Seeded values for whatever a graph takes: weights in any format, and inputs that make sense to their users.

use anyhow::{Context, Result, bail};
use attar_format::{DType, Encoded, FormatRef, Scale, Value};
use attar_ir::{Dim, Elem, Graph, OpKind, Sym, Tensor, TensorType, ValueId, WeightStore};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tokens of a random step, and rows whose logits are wanted.
pub const TOKENS: usize = 5;
pub const ROWS: usize = 3;

/// A generator that depends on the seed and on what it is for.
pub fn rng(seed: u64, purpose: &str) -> ChaCha8Rng {
    // FNV-1a: any fixed mixture will do.
    let mixed = purpose
        .bytes()
        .fold(seed ^ 0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    ChaCha8Rng::seed_from_u64(mixed)
}

/// A store with every weight the graph names.
///
/// # Errors
/// When a weight has a type no weight can have.
pub fn weights(graph: &Graph, seed: u64) -> Result<WeightStore> {
    let mut store = WeightStore::new();
    for (_, weight) in graph.weights() {
        if !store.contains(&weight.name) {
            add_weight(&mut store, &weight.name, &weight.ty, seed)?;
        }
    }
    Ok(store)
}

/// Adds one weight of that type. Vectors are near one, as gains are; matrices keep the size of what they multiply.
///
/// # Errors
/// As [`weights`].
pub fn add_weight(store: &mut WeightStore, name: &str, ty: &TensorType, seed: u64) -> Result<()> {
    let shape: Vec<usize> = ty.shape.iter().filter_map(|d| d.fixed()).collect();
    let rng = &mut rng(seed, name);
    match (ty.elem, shape.as_slice()) {
        (Elem::Plain(DType::F32), [n]) => {
            let values = (0..*n).map(|_| rng.random_range(0.5..1.5)).collect();
            store.add_values(name, &shape, values);
        }
        (Elem::Plain(DType::F32), dims) => {
            let bound = (3.0 / dims.last().copied().unwrap_or(1) as f32).sqrt();
            let values = (0..dims.iter().product()).map(|_| rng.random_range(-bound..bound)).collect();
            store.add_values(name, &shape, values);
        }
        (Elem::Coded(format), [n, k]) => {
            store.set_encoded(name, &encoded(format, *n, *k, rng)?)?;
        }
        _ => bail!("no weight can have type {ty}"),
    }
    Ok(())
}

/// A random matrix in a format's codes, with every feature of the format in use.
///
/// # Errors
/// When the format cannot hold the shape.
pub fn encoded(format: FormatRef, n: usize, k: usize, rng: &mut impl Rng) -> Result<Encoded> {
    let bound = (3.0 / k as f32).sqrt();
    if let Value::Float(_) = format.value {
        let values: Vec<f32> = (0..n * k).map(|_| rng.random_range(-bound..bound)).collect();
        return Ok(Encoded::from_f32(format, n, k, &values)?);
    }
    let mut out = Encoded::zeros(format, n, k)?;
    for code in &mut out.codes {
        *code = match format.value {
            Value::Table(table) => rng.random_range(0..1 << table.bits),
            _ => rng.random_range(-127i8..=127) as u8,
        };
    }
    out.row_scale.iter_mut().for_each(|s| *s = bound / 127.0 / 20.0 * rng.random_range(0.7..1.3));
    for field in &mut out.field {
        *field = match format.scale {
            Scale::Bf16 => bf16::from_f32(bound / 127.0 * rng.random_range(0.7..1.3)).to_bits(),
            _ => rng.random_range(0..=255),
        };
    }
    Ok(out)
}

/// How many sequences a random step begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sequences {
    One,
    Two,
}

/// What a random step is given: values for the graph's inputs, and the sequence of each token.
#[derive(Clone, Debug)]
pub struct Inputs {
    pub tensors: Vec<Tensor>,
    pub seqs: Vec<i32>,
}

/// Values for every input of the graph, for a step that begins two sequences, or one.
///
/// # Errors
/// When an integer input is used in a way nothing is known about.
pub fn inputs(graph: &Graph, seed: u64, sequences: Sequences) -> Result<Inputs> {
    let second = if sequences == Sequences::Two { 3 } else { TOKENS };
    let seqs: Vec<i32> = (0..TOKENS).map(|t| i32::from(t >= second)).collect();
    let tensors = graph.inputs().iter().map(|id| {
        let value = ValueId { node: *id, slot: 0 };
        let ty = graph.ty(value);
        let size = |d: &Dim| match d {
            Dim::Fixed(n) => *n,
            Dim::Sym(Sym::R) => ROWS,
            Dim::Sym(_) => TOKENS,
        };
        let shape: Vec<usize> = ty.shape.iter().map(size).collect();
        let count: usize = shape.iter().product();
        let rng = &mut rng(seed, &graph.node(*id).name);
        if ty.elem.is_float() {
            return Ok(Tensor::real(shape, (0..count).map(|_| rng.random_range(-1.7..1.7)).collect()));
        }
        let mut bound = i32::MAX;
        let mut are_positions = false;
        for (user, slot) in graph.users(value) {
            let indexed = |slot: usize| graph.ty(graph.inputs_of(user)[slot]).shape[0];
            match graph.op(user) {
                OpKind::Embed(_) => bound = bound.min(size(&indexed(1)) as i32),
                OpKind::GatherRows(_) => bound = bound.min(size(&indexed(0)) as i32),
                OpKind::Rope(_) | OpKind::Attention(_) | OpKind::QkvRope(_) => are_positions = true,
                other => bail!("input {slot} of {other:?} is an integer of unknown meaning"),
            }
        }
        let values = (0..count).map(|t| match (are_positions, t) {
            (true, t) => (if t >= second { t - second } else { t }) as i32,
            (false, _) => rng.random_range(0..bound),
        });
        let values = values.collect();
        Ok(Tensor::int(shape, values))
    });
    Ok(Inputs { tensors: tensors.collect::<Result<_>>().context("random inputs")?, seqs })
}
