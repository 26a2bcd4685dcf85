//! `weight`: a tensor of the weight store, by name. Printed `%w = weight @name : f32[576,576]`.
//! Inputs   none.   Rules  (C1) every dimension is a number.   Result: the declared type.

use super::{Op, arity, require};
use crate::attr::Attrs;
use crate::error::{Error, ErrorKind, Result};
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::TensorType;

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct Weight {
    pub name: crate::weights::WeightName,
    pub ty: TensorType,
}

impl Weight {
    pub(crate) fn from_attrs(mut attrs: Attrs) -> Result<Weight> {
        Err(Error::new(ErrorKind::Attribute { op: std::mem::take(&mut attrs.op), name: "weight".into(), problem: "weights are written `weight @name : type`".into() }))
    }
}

impl Op for Weight {
    fn name(&self) -> &'static str {
        "weight"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        arity("weight", 0..=0, inputs.len())?;
        require("weight", "C1", self.ty.shape.iter().all(|d| d.fixed().is_some()), "fixed dimensions", &self.ty)?;
        Ok(vec![self.ty.clone()])
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("weight")
    }

    fn eval(&self, cx: &mut EvalCx<'_>, _inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let shape: Vec<usize> = self.ty.shape.iter().filter_map(|d| d.fixed()).collect();
        let values = cx.weights.read_f32(&self.name)?;
        let expected = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        if expected != Some(values.len()) {
            let problem = format!("the graph declares {}, the store holds {} values", self.ty, values.len());
            return Err(Error::new(ErrorKind::Weight { problem }).at_tensor(&*self.name));
        }
        Ok(vec![Tensor::real(shape, values.into_iter().map(f64::from).collect())])
    }
}
