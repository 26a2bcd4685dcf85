//! The table of packed tensors of one lowering: each weight, in each layout it is wanted in, stored once.

use super::error::{LowerError, LowerErrorKind};
use crate::pack::{PackedTensor, RowOrder, TENSOR_ALIGN, TensorLayout};
use attar_artifact::program::Arg;
use attar_format::{FormatError, formats};
use attar_ir::{Elem, TensorType, WeightName};

/// Tensors in the order lowering met them, which is the order a step reads them in.
#[derive(Debug, Default)]
pub(super) struct TensorTable {
    pub(super) list: Vec<PackedTensor>,
    pub(super) len: u64,
}

impl TensorTable {
    /// Address of a matrix in its weight format.
    pub(super) fn matrix(
        &mut self,
        name: &WeightName,
        ty: &TensorType,
        order: RowOrder,
    ) -> Result<Arg, LowerError> {
        let format = match ty.elem {
            Elem::Coded(format) => format,
            Elem::Plain(_) => &formats::F32,
        };
        self.get(name, ty, TensorLayout::Matrix { format, order })
    }

    /// Address of plain f32 values: gains, biases, and weights used as activations.
    pub(super) fn plain(&mut self, name: &WeightName, ty: &TensorType) -> Result<Arg, LowerError> {
        self.get(name, ty, TensorLayout::Plain)
    }

    fn get(&mut self, name: &WeightName, ty: &TensorType, layout: TensorLayout) -> Result<Arg, LowerError> {
        if let Some(t) = self.list.iter().find(|t| t.source == *name && t.layout == layout) {
            return Ok(Arg::Weight { offset: t.offset, len: t.len });
        }
        let shape: Vec<usize> = ty.shape.iter().filter_map(|d| d.fixed()).collect();
        let Some(len) = PackedTensor::len_of(layout, &shape) else {
            return Err(misfit(layout, &shape));
        };
        let offset = self.len.next_multiple_of(TENSOR_ALIGN);
        self.len = offset.checked_add(len).ok_or(LowerErrorKind::Overflow)?;
        let name_in_file = self.fresh_name(name, layout);
        self.list.push(PackedTensor { name: name_in_file, source: name.clone(), layout, shape, offset, len });
        Ok(Arg::Weight { offset, len })
    }

    /// The weight's own name; a weight stored a second time in another layout gets a suffix that says which.
    fn fresh_name(&self, name: &str, layout: TensorLayout) -> String {
        if self.list.iter().all(|t| t.name != name) {
            return name.to_owned();
        }
        let suffix = match layout {
            TensorLayout::Matrix { order: RowOrder::Natural, .. } => "rows",
            TensorLayout::Matrix { order: RowOrder::GateUp, .. } => "gate-up",
            TensorLayout::Plain => "plain",
        };
        format!("{name}#{suffix}")
    }
}

fn misfit(layout: TensorLayout, shape: &[usize]) -> LowerError {
    match (layout, shape) {
        (TensorLayout::Matrix { format, .. }, [n, k]) => LowerErrorKind::Format(FormatError::Shape {
            format: format.name,
            n: *n,
            k: *k,
            group: format.group,
        })
        .into(),
        _ => LowerErrorKind::Overflow.into(),
    }
}
