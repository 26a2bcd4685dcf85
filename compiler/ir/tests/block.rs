//! The library by itself: a small attention block read, run, decomposed and printed.

use attar_ir::interp::{KvState, Precision, Step, run_step};
use attar_ir::{WeightStore, text, verify};

const BLOCK: &str = "
func @block(%tokens: i32[T], %positions: i32[T], %rows: i32[R]) -> f32[R,6] {
  %table = weight @embed : f32[6,4]
  %w = weight @qkv : f32[8,4]
  %x = embed %tokens, %table
  %a#0, %a#1, %a#2 = qkv_rope %x, %w, %positions {heads = 2, kv_heads = 1, head_dim = 2, inv_freq = [1], mscale = 1, eps = 1e-5}
  %y = attention %a#0, %a#1, %a#2, %positions {layer = 0, scale = 0.7071067811865476}
  %z = reshape %y {shape = [T, 4]}
  %last = gather_rows %z, %rows
  %logits = linear %last, %table
  return %logits
}
";

fn store() -> WeightStore {
    let mut store = WeightStore::new();
    let wave = |n: usize, f: f32| (0..n).map(|i| (i as f32 * f).sin()).collect::<Vec<f32>>();
    store.add_values("embed", &[6, 4], wave(24, 0.7));
    store.add_values("qkv", &[8, 4], wave(32, 1.3));
    store
}

#[test]
fn printing_and_reading_gives_the_same_graph() {
    let graph = text::parse(BLOCK).unwrap().remove(0);
    let printed = text::print(&graph);
    let again = text::parse(&printed).unwrap().remove(0);
    assert_eq!(graph, again);
    assert_eq!(printed, text::print(&again));
    assert_eq!(verify(&again, Some(&store())), Ok(()));
}

#[test]
fn one_token_at_a_time_gives_what_all_at_once_gives() {
    let graph = text::parse(BLOCK).unwrap().remove(0);
    let weights = store();
    let tokens = [3, 1, 4, 1, 5];
    let mut cache = KvState::default();
    let all = Step::new(&tokens, 0).all_rows();
    let all = run_step(&graph, &weights, Precision::F64, &mut cache, &all).unwrap().remove(0);
    let mut cache = KvState::default();
    for (t, token) in tokens.iter().enumerate() {
        let step = Step::new(&[*token], t as i32);
        let one = run_step(&graph, &weights, Precision::F64, &mut cache, &step).unwrap().remove(0);
        assert_eq!(one.as_real(), &all.as_real()[t * 6..(t + 1) * 6]);
    }
}

#[test]
fn a_fused_op_means_its_decomposition() {
    let graph = text::parse(BLOCK).unwrap().remove(0);
    let mut core = graph.clone();
    let fused = core.by_name("a").unwrap();
    assert!(core.expand(fused).unwrap());
    assert_eq!(verify(&core, Some(&store())), Ok(()));
    let weights = store();
    let step = Step::new(&[2, 5, 0], 0);
    let run = |g| run_step(g, &weights, Precision::F64, &mut KvState::default(), &step).unwrap();
    assert_eq!(run(&graph), run(&core));
}

#[test]
fn sequences_do_not_see_each_other() {
    let graph = text::parse(BLOCK).unwrap().remove(0);
    let weights = store();
    let run =
        |step: &Step| run_step(&graph, &weights, Precision::F32, &mut KvState::default(), step).unwrap();
    let alone = run(&Step::new(&[1, 2], 0));
    let mixed =
        Step { tokens: vec![5, 1, 4, 2], positions: vec![0, 0, 1, 1], seqs: vec![7, 9, 7, 9], rows: vec![3] };
    assert_eq!(alone, run(&mixed));
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let graph = text::parse(BLOCK).unwrap().remove(0);
    let weights = store();
    let run = |step: &Step| {
        let result = run_step(&graph, &weights, Precision::F32, &mut KvState::default(), step);
        result.unwrap_err().to_string()
    };
    let mut step = Step::new(&[1, 2], 0);
    step.positions.pop();
    assert!(run(&step).contains("i32[T] with T=2"), "{}", run(&step));
    assert!(run(&Step::new(&[6], 0)).contains("embed indices below 6"));
    assert!(run(&Step::new(&[1], 3)).contains("positions of sequence 0 to follow the 0 cached ones"));
    let mut step = Step::new(&[1, 2], 0);
    step.rows = vec![2];
    assert!(run(&step).contains("gather_rows indices below 2"));
    step.rows = vec![-1];
    assert!(run(&step).contains("got -1"));
}

#[test]
fn a_long_text_with_one_hot_value_is_read_without_delay() {
    let mut source = String::from("func @long(%x: f32[T,2]) -> f32[T,2] {\n");
    for i in 0..100_000 {
        source.push_str(&format!("  %n{i} = silu %x\n"));
    }
    source.push_str("  return %n99999\n}\n");
    // Quadratic anywhere would take minutes.
    let graph = text::parse(&source).unwrap().remove(0);
    assert_eq!(graph.len(), 100_001);
    assert_eq!(verify(&graph, None), Ok(()));
    assert_eq!(text::parse(&text::print(&graph)).unwrap()[0], graph);
}
