//! Which format each tensor gets under a budget: a knapsack in which every tensor takes exactly one of its choices.

/// What one choice costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    pub bytes: u64,
    /// What is lost, at least 0.
    pub loss: f64,
}

/// What is to be kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Least loss within so many bytes.
    Bytes(u64),
    /// Fewest bytes with no more loss.
    Loss(f64),
}

/// Why nothing keeps a budget: the nearest that can be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unmet {
    Bytes(u64),
    Loss(f64),
}

/// Steps that a budget of bytes is counted in.
const STEPS: u64 = 1 << 14;

/// The index of a choice for each tensor. Losses add up, and so do bytes.
///
/// Dynamic programming over steps of the budget, each tensor rounded up to a whole step; what the rounding leaves is spent on
/// single exchanges. The result keeps the budget exactly, and loses no more than the same choice for every tensor that
/// keeps it.
///
/// # Errors
/// [`Unmet`] when no combination keeps the budget.
pub fn allocate(tensors: &[Vec<Choice>], budget: Budget) -> Result<Vec<usize>, Unmet> {
    let least_bytes = |of: &[Choice]| of.iter().map(|c| c.bytes).min().unwrap_or(0);
    let most_bytes = |of: &[Choice]| of.iter().map(|c| c.bytes).max().unwrap_or(0);
    let least_loss = |of: &[Choice]| of.iter().map(|c| c.loss).fold(f64::INFINITY, f64::min);
    let limit = match budget {
        Budget::Bytes(limit) => limit,
        Budget::Loss(_) => tensors.iter().map(|t| most_bytes(t)).sum(),
    };
    let fewest: u64 = tensors.iter().map(|t| least_bytes(t)).sum();
    if fewest > limit {
        return Err(Unmet::Bytes(fewest));
    }
    if let Budget::Loss(most) = budget {
        let least: f64 = tensors.iter().map(|t| least_loss(t)).sum();
        if least > most {
            return Err(Unmet::Loss(least));
        }
    }
    // Only what goes beyond the smallest choices is counted in steps.
    let room = limit - fewest;
    let step = room.div_ceil(STEPS).max(1);
    let cells = (room / step) as usize + 1;
    let mut best = vec![0.0f64; cells];
    let mut taken: Vec<Vec<u8>> = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let base = least_bytes(tensor);
        let mut next = vec![f64::INFINITY; cells];
        let mut chosen = vec![0u8; cells];
        for (index, choice) in tensor.iter().enumerate() {
            let width = (choice.bytes - base).div_ceil(step) as usize;
            for cell in width..cells {
                let loss = best[cell - width] + choice.loss;
                if loss < next[cell] {
                    (next[cell], chosen[cell]) = (loss, index as u8);
                }
            }
        }
        best = next;
        taken.push(chosen);
    }
    let end = match budget {
        Budget::Bytes(_) => cells - 1,
        // Losses only fall as bytes grow.
        Budget::Loss(most) => best.iter().position(|loss| *loss <= most).unwrap_or(cells - 1),
    };
    let mut plan = vec![0; tensors.len()];
    let mut cell = end;
    for (i, tensor) in tensors.iter().enumerate().rev() {
        plan[i] = usize::from(taken[i][cell]);
        cell -= (tensor[plan[i]].bytes - least_bytes(tensor)).div_ceil(step) as usize;
    }
    if let Budget::Bytes(limit) = budget {
        spend(tensors, &mut plan, limit);
    }
    Ok(better_of(tensors, plan, budget))
}

/// Bytes and loss of a plan.
pub fn totals(tensors: &[Vec<Choice>], plan: &[usize]) -> Choice {
    tensors.iter().zip(plan).fold(Choice { bytes: 0, loss: 0.0 }, |sum, (t, i)| Choice {
        bytes: sum.bytes + t[*i].bytes,
        loss: sum.loss + t[*i].loss,
    })
}

/// Exchanges single choices for better ones while there is room, the one that saves most first.
fn spend(tensors: &[Vec<Choice>], plan: &mut [usize], limit: u64) {
    loop {
        let used = totals(tensors, plan).bytes;
        let mut most = (0.0, None);
        for (t, tensor) in tensors.iter().enumerate() {
            let now = tensor[plan[t]];
            for (i, choice) in tensor.iter().enumerate() {
                let gain = now.loss - choice.loss;
                if gain > most.0 && used - now.bytes + choice.bytes <= limit {
                    most = (gain, Some((t, i)));
                }
            }
        }
        match most.1 {
            Some((t, i)) => plan[t] = i,
            None => return,
        }
    }
}

/// The plan, or the same choice everywhere where that is better.
fn better_of(tensors: &[Vec<Choice>], plan: Vec<usize>, budget: Budget) -> Vec<usize> {
    let choices = tensors.iter().map(Vec::len).max().unwrap_or(0);
    let mut best = plan;
    for i in 0..choices {
        let uniform: Vec<usize> = tensors.iter().map(|t| i.min(t.len() - 1)).collect();
        let (new, old) = (totals(tensors, &uniform), totals(tensors, &best));
        let better = match budget {
            Budget::Bytes(limit) => new.bytes <= limit && new.loss < old.loss,
            Budget::Loss(most) => new.loss <= most && new.bytes < old.bytes,
        };
        if better {
            best = uniform;
        }
    }
    best
}
