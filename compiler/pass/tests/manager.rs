//! The manager: order, verification, dumps, fuel, early ends, and whose fault an invalid graph is.

mod toy;

use attar_pass::{
    ErrorKind, Event, Family, Fuel, Manager, Phase, Pipeline, PrintAfter, Recipe, Report, Result, Stop,
};

const RECIPE: &str = "[[pass]]\nname = \"touch-weights\"\nmode = \"firm\"\n";

fn pipeline(defaults: &[&str]) -> Pipeline {
    let registry = toy::registry();
    let recipe = Recipe::parse(RECIPE, "r.toml", &registry).unwrap();
    Pipeline::new(defaults, &recipe, &registry).unwrap()
}

fn run(manager: &Manager, pipeline: &Pipeline) -> (Result<Report>, Vec<String>) {
    let (mut graph, mut weights) = toy::graph();
    let mut log = Vec::new();
    let result = manager.run(pipeline, &mut graph, &mut weights, &mut |event| {
        log.push(match event {
            Event::Started { index, total, decl } => format!("{index}/{total} {}", decl.name),
            Event::Progress { what, done, total, .. } => format!("  {done}/{total} {what}"),
            Event::Note { text, .. } => format!("  {text}"),
            Event::Dump(d) => format!("dump {} {}", d.file_name(), !d.text.is_empty()),
            Event::Finished(r) => {
                format!("  {} rewrites, {} -> {} nodes", r.rewrites, r.nodes_before, r.nodes_after)
            }
        });
    });
    (result, log)
}

#[test]
fn passes_run_by_phase_and_are_reported() {
    let manager = Manager { print_after: PrintAfter::All, ..Manager::default() };
    let (report, log) = run(&manager, &pipeline(&["swap-add"]));
    assert_eq!(
        log,
        [
            "dump 00-import.air true",
            "1/2 touch-weights",
            "  0/2 layers.0.up_proj.weight",
            "  1/2 layers.0.down_proj.weight",
            "  2 rewrites, 6 -> 6 nodes",
            "dump 01-touch-weights.air true",
            "2/2 swap-add",
            "  1 rewrites, 6 -> 6 nodes",
            "dump 02-swap-add.air true",
        ]
    );
    let report = report.unwrap();
    assert!(!report.stopped);
    assert_eq!(report.metrics.len(), 2);
    let json = serde_json::to_string(&report).unwrap();
    assert!(
        json.contains(r#""subject":"layers.0.up_proj.weight","values":{"mode":"firm","strength":0.5}"#),
        "{json}"
    );
    assert!(!json.contains("time"), "times differ between compiles and must not reach the artifact");
}

#[test]
fn fuel_is_shared_by_all_passes() {
    for (fuel, expected) in [(0, [0, 0]), (1, [1, 0]), (2, [2, 0]), (3, [2, 1]), (9, [2, 1])] {
        let manager = Manager { fuel: Fuel::limited(fuel), ..Manager::default() };
        let report = run(&manager, &pipeline(&["swap-add"])).0.unwrap();
        assert_eq!(report.passes.iter().map(|p| p.rewrites).collect::<Vec<_>>(), expected);
    }
    let manager = Manager { fuel: Fuel::limited(1), ..Manager::default() };
    let report = run(&manager, &pipeline(&["swap-add"])).0.unwrap();
    assert_eq!(report.passes[0].last_rewrite.as_deref(), Some("layers.0.up_proj.weight"));
}

#[test]
fn stops_after_a_phase_or_a_pass() {
    let pipeline = pipeline(&["swap-add"]);
    for (text, ran, stopped) in [
        ("canonicalize", 0, true),
        ("compress", 1, true),
        ("touch-weights", 1, true),
        ("swap-add", 2, true),
        ("fuse", 2, false),
        ("package", 2, false),
    ] {
        let stop = Stop::parse(text, &pipeline).unwrap();
        let manager = Manager { stop_after: Some(stop), ..Manager::default() };
        let report = run(&manager, &pipeline).0.unwrap();
        assert_eq!((report.passes.len(), report.stopped), (ran, stopped), "{text}");
    }
    let e = Stop::parse("compres", &pipeline).unwrap_err();
    assert!(e.to_string().contains("did you mean compress?"), "{e}");
    assert_eq!(Phase::by_name("compress"), Some(Phase::Compress));
}

#[test]
fn only_wanted_dumps_are_made() {
    let wanted = |names: &[&str]| PrintAfter::Passes(names.iter().map(|s| (*s).to_owned()).collect());
    let manager = Manager { print_after: wanted(&["swap-add"]), ..Manager::default() };
    let (_, log) = run(&manager, &pipeline(&["swap-add"]));
    assert_eq!(
        log.iter().filter(|l| l.starts_with("dump")).collect::<Vec<_>>(),
        ["dump 02-swap-add.air true"]
    );
    let manager = Manager { print_after: wanted(&["swop-add"]), ..Manager::default() };
    let e = run(&manager, &pipeline(&["swap-add"])).0.unwrap_err();
    assert!(e.to_string().contains("did you mean swap-add?"), "{e}");
}

#[test]
fn an_invalid_graph_is_the_fault_of_the_pass_before() {
    let (result, _) = run(&Manager::default(), &pipeline(&["swap-add", "break-weight"]));
    let e = result.unwrap_err();
    assert_eq!(e.family(), Family::Bug);
    assert!(e.to_string().contains("bug in break-weight: after its last rewrite (the first weight)"), "{e}");
    let ErrorKind::Broken { before, after, .. } = &*e.kind else { panic!("{e:?}") };
    assert!(!before.contains("no.such.weight") && after.contains("no.such.weight"));
    assert_eq!(e.air(), Some(before.as_str()));
}
