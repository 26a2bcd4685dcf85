//! The `.air` text form: parse ∘ print = identity.
