//! `input`: a function input. Printed in the function's signature, never as a statement.
//! Inputs   none.   Result: the declared type.

use super::{Op, arity};
use crate::attr::Attrs;
use crate::error::{Error, ErrorKind, Result};
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::TensorType;

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    pub ty: TensorType,
}

impl Input {
    pub(crate) fn from_attrs(mut attrs: Attrs) -> Result<Input> {
        Err(Error::new(ErrorKind::Attribute { op: std::mem::take(&mut attrs.op), name: "input".into(), problem: "inputs are declared in the signature".into() }))
    }
}

impl Op for Input {
    fn name(&self) -> &'static str {
        "input"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        arity("input", 0..=0, inputs.len())?;
        Ok(vec![self.ty.clone()])
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("input")
    }

    fn eval(&self, _cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        // The interpreter binds inputs before it evaluates anything; reaching this means it was asked for one by itself.
        let expected = format!("a value for the input of type {}", self.ty);
        Err(Error::new(ErrorKind::Input { expected, got: format!("{} values", inputs.len()) }))
    }
}
