//! The knapsack keeps its budget, loses no more than one format for all, and comes near the optimum.

use attar_passes::quantize::allocation::{Budget, Choice, Unmet, allocate, totals};
use proptest::prelude::*;

fn tensors() -> impl Strategy<Value = Vec<Vec<Choice>>> {
    let tensor = (1u64..50, 0.0f64..10.0, prop::collection::vec((1u64..40, 0.1f64..0.9), 1..5)).prop_map(
        |(bytes, loss, steps)| {
            // From coarse to fine, as formats are.
            let mut choice = Choice { bytes, loss };
            let mut all = vec![choice];
            for (more, less) in steps {
                choice = Choice { bytes: choice.bytes + more, loss: choice.loss * less };
                all.push(choice);
            }
            all
        },
    );
    prop::collection::vec(tensor, 1..6)
}

/// Every combination.
fn all(tensors: &[Vec<Choice>]) -> Vec<Choice> {
    tensors.iter().fold(vec![Choice { bytes: 0, loss: 0.0 }], |sums, tensor| {
        sums.iter()
            .flat_map(|s| tensor.iter().map(|c| Choice { bytes: s.bytes + c.bytes, loss: s.loss + c.loss }))
            .collect()
    })
}

proptest! {
    #[test]
    fn budgets_of_bytes_are_kept_and_used(tensors in tensors(), share in 0.0f64..1.2) {
        let fewest: u64 = tensors.iter().map(|t| t[0].bytes).sum();
        let most: u64 = tensors.iter().map(|t| t[t.len() - 1].bytes).sum();
        let limit = (most as f64 * share) as u64;
        match allocate(&tensors, Budget::Bytes(limit)) {
            Err(unmet) => {
                prop_assert!(limit < fewest);
                prop_assert_eq!(unmet, Unmet::Bytes(fewest));
            }
            Ok(plan) => {
                let got = totals(&tensors, &plan);
                prop_assert!(got.bytes <= limit);
                // So small budgets are counted in single bytes: the optimum is found.
                let fitting = all(&tensors).into_iter().filter(|c| c.bytes <= limit);
                let best = fitting.map(|c| c.loss).fold(f64::INFINITY, f64::min);
                prop_assert!(got.loss <= best + 1e-9, "{} instead of {best}", got.loss);
            }
        }
    }

    #[test]
    fn coarse_steps_keep_the_budget_and_beat_one_choice_for_all(tensors in tensors(), share in 0.5f64..1.0) {
        let large: Vec<Vec<Choice>> = tensors
            .iter()
            .map(|t| t.iter().map(|c| Choice { bytes: c.bytes * 1_234_567 + 7, ..*c }).collect())
            .collect();
        let most: u64 = large.iter().map(|t| t[t.len() - 1].bytes).sum();
        let limit = (most as f64 * share) as u64;
        let Ok(plan) = allocate(&large, Budget::Bytes(limit)) else { return Ok(()) };
        let got = totals(&large, &plan);
        prop_assert!(got.bytes <= limit);
        for i in 0..5 {
            let uniform: Vec<usize> = large.iter().map(|t| i.min(t.len() - 1)).collect();
            let other = totals(&large, &uniform);
            prop_assert!(other.bytes > limit || got.loss <= other.loss);
        }
    }

    #[test]
    fn budgets_of_loss_are_kept(tensors in tensors(), most in 0.0f64..20.0) {
        let least: f64 = tensors.iter().map(|t| t[t.len() - 1].loss).sum();
        match allocate(&tensors, Budget::Loss(most)) {
            Err(Unmet::Loss(nearest)) => prop_assert!(least > most && (nearest - least).abs() < 1e-9),
            Err(other) => prop_assert!(false, "{other:?}"),
            Ok(plan) => {
                let got = totals(&tensors, &plan);
                prop_assert!(got.loss <= most + 1e-9);
                let fitting = all(&tensors).into_iter().filter(|c| c.loss <= most - 1e-9);
                let fewest = fitting.map(|c| c.bytes).min().unwrap_or(u64::MAX);
                prop_assert!(got.bytes <= fewest, "{} instead of {fewest}", got.bytes);
            }
        }
    }
}
