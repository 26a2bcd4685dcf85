//! Recipes: what is accepted, how defaults are written out, and what every mistake is answered with.

mod toy;

use attar_pass::{ErrorKind, Family, Preset, Recipe, Registry};

fn error(text: &str) -> attar_pass::Error {
    Recipe::parse(text, "r.toml", &toy::registry()).unwrap_err()
}

#[test]
fn resolved_recipe_has_every_default_and_is_a_fixed_point() {
    let registry = toy::registry();
    let text = "# a comment\n[[pass]]\nmode = 'firm'\nstrength = 1\nname = \"touch-weights\"\n\n[[pass]]\nname='swap-add'\n";
    let recipe = Recipe::parse(text, "r.toml", &registry).unwrap();
    let resolved = recipe.to_toml();
    assert_eq!(
        resolved,
        "[[pass]]\nname = \"touch-weights\"\ntensors = [\"*\"]\nexclude = []\nmode = \"firm\"\nstrength = 1.0\n\
         rounds = 1\nloud = false\n\n[[pass]]\nname = \"swap-add\"\n"
    );
    let again = Recipe::parse(&resolved, "resolved", &registry).unwrap();
    assert_eq!(again, recipe);
    assert_eq!(again.to_toml(), resolved);
    assert_eq!(Recipe::parse("", "empty", &registry).unwrap().to_toml(), "");
}

#[test]
fn every_mistake_names_its_place_and_the_nearest_name() {
    let cases: &[(&str, (usize, usize), &str)] = &[
        ("[[pass]\nname = 1\n", (1, 8), "not valid TOML"),
        (
            "[[pass]]\nname = \"touch-wieghts\"\n",
            (2, 8),
            "no pass is called touch-wieghts; did you mean touch-weights?",
        ),
        ("[[pass]]\nname = \"zzzz\"\n", (2, 8), "no pass is called zzzz; `attar passes` lists them"),
        ("[[pass]]\nmode = \"firm\"\n", (1, 1), "every [[pass]] needs the name of a pass"),
        ("[[pass]]\nname = 3\n", (2, 8), "name: must be a string"),
        ("pass = 3\n", (1, 1), "must be an array of tables"),
        ("pass = [3]\n", (1, 9), "must be an array of tables"),
        ("[[passes]]\nname = \"x\"\n", (1, 3), "did you mean pass?"),
        (
            "[[pass]]\nname = \"touch-weights\"\nmode = \"firm\"\nstrenth = 0.5\n",
            (4, 1),
            "touch-weights has no option strenth; did you mean strength?",
        ),
        (
            "[[pass]]\nname = \"touch-weights\"\nmode = \"frim\"\n",
            (3, 8),
            "option mode must be \"gentle\", \"firm\", got \"frim\"; did you mean firm?",
        ),
        (
            "[[pass]]\nname = \"touch-weights\"\nmode = \"firm\"\nrounds = 9\n",
            (4, 10),
            "option rounds must be an integer from 1 to 8, got 9",
        ),
        (
            "[[pass]]\nname = \"touch-weights\"\nmode = \"firm\"\nrounds = \"9\"\n",
            (4, 10),
            "option rounds must be an integer from 1 to 8, got a string",
        ),
        (
            "[[pass]]\nname = \"touch-weights\"\nmode = \"firm\"\nstrength = nan\n",
            (4, 12),
            "option strength must be a number from 0 to 1, got NaN",
        ),
        (
            "[[pass]]\nname = \"touch-weights\"\nmode = \"firm\"\nloud = 1\n",
            (4, 8),
            "option loud must be true or false, got an integer",
        ),
        (
            "[[pass]]\nname = \"touch-weights\"\nmode = \"firm\"\nloud = [true]\n",
            (4, 8),
            "options are strings, numbers, true or false",
        ),
        ("[[pass]]\nname = \"touch-weights\"\n", (1, 1), "option mode is missing; give \"gentle\", \"firm\""),
        (
            "[[pass]]\nname = \"touch-weights\"\nmode = \"firm\"\ntensors = [\"a\", \"b[\"]\n",
            (4, 17),
            "glob \"b[\"",
        ),
        ("[[pass]]\nname = \"touch-weights\"\nmode = \"firm\"\ntensors = []\n", (4, 11), "is empty"),
        ("[[pass]]\nname = \"touch-weights\"\nmode = \"firm\"\ntensors = \"*\"\n", (4, 11), "list of globs"),
        ("[[pass]]\nname = \"swap-add\"\ntensors = [\"*\"]\n", (3, 11), "swap-add concerns the whole graph"),
        (
            "[[pass]]\nname = \"swap-add\"\n[[pass]]\nname = \"touch-weights\"\nmode = \"firm\"\n",
            (3, 1),
            "touch-weights belongs to phase compress and cannot run after swap-add of phase fuse",
        ),
    ];
    for (text, line, message) in cases {
        let e = error(text);
        assert_eq!(e.at.line, Some(*line), "{text}\n{e}");
        assert!(e.to_string().starts_with(&format!("r.toml:{}:{}: ", line.0, line.1)), "{e}");
        assert!(e.to_string().contains(message), "{text}\n{e}");
        assert_eq!(e.family(), Family::Input);
    }
}

#[test]
fn columns_count_characters() {
    let e = error("# é\n[[pass]]\nname = \"touch-weights\"\nmode = \"ürgh\" # é\nloud = 1\n");
    assert_eq!(e.at.line, Some((5, 8)), "{e}");
}

#[test]
fn globs_must_match_the_model() {
    let (graph, _) = toy::graph();
    let registry = toy::registry();
    let check = |tensors: &str| {
        let text = format!("[[pass]]\nname = \"touch-weights\"\nmode = \"firm\"\n{tensors}\n");
        Recipe::parse(&text, "r.toml", &registry).unwrap().check_tensors(&graph)
    };
    check("tensors = [\"layers.*\"]\nexclude = [\"*.{down,o}_proj.weight\"]").unwrap();
    check("").unwrap();
    let e = check("tensors = [\"layers.*\", \"layers.0.up_prj.weight\"]").unwrap_err();
    assert_eq!(
        *e.kind,
        ErrorKind::GlobMatchesNothing {
            glob: "layers.0.up_prj.weight".to_owned(),
            nearest: Some("layers.0.up_proj.weight".to_owned())
        }
    );
    assert!(e.to_string().starts_with("touch-weights: "), "{e}");
    check("exclude = [\"lm_head.*\"]").unwrap_err();
}

#[test]
fn presets_have_names() {
    let e = Preset::by_name("bf61").unwrap_err();
    assert!(e.to_string().contains("did you mean bf16?"), "{e}");
}

#[test]
fn two_passes_of_one_name_are_refused() {
    let mut registry = Registry::new().unwrap();
    registry.add(&toy::TOUCH).unwrap();
    let e = registry.add(&toy::TOUCH).unwrap_err();
    assert_eq!(e.family(), Family::Bug);
}

#[test]
fn garbage_never_panics() {
    let registry = toy::registry();
    let whole = "[[pass]]\nname = \"touch-weights\"\ntensors = [\"a{b,c}*\", \"[!x]?\"]\nmode = \"firm\"\nstrength = 1e-3\nrounds = 0x3\n";
    for end in (0..whole.len()).filter(|i| whole.is_char_boundary(*i)) {
        let _ = Recipe::parse(&whole[..end], "cut", &registry);
    }
    for text in [
        "[[pass]]\nname=\"touch-weights\"\nmode=\"firm\"\nrounds=99999999999999999999\n",
        "\u{0}",
        "pass.name = 1",
        "[pass]",
        "[[pass.x]]",
        "pass=[{name={}}]",
        "[[pass]]\nname=\"swap-add\"\n1979-05-27=1979-05-27",
    ] {
        assert!(Recipe::parse(text, "garbage", &registry).is_err(), "{text}");
    }
}
