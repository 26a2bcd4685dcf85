//! Recipes: what is accepted prints, defaults written out, to text that reads as the same recipe.
#![no_main]

use attar_pass::{Recipe, Registry};
use attar_passes as _;
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static REGISTRY: LazyLock<Registry> =
    LazyLock::new(|| Registry::new().expect("the built-in passes register"));

fuzz_target!(|text: &str| {
    let Ok(recipe) = Recipe::parse(text, "fuzz.toml", &REGISTRY) else { return };
    let printed = recipe.to_toml();
    let again = Recipe::parse(&printed, "printed.toml", &REGISTRY).expect("a printed recipe reads");
    assert_eq!(again, recipe);
    assert_eq!(again.to_toml(), printed);
});
