//! Every file below `filetests/`; the harness and its modes are described in `attar_tests::filetest`.

use std::path::Path;

#[test]
fn filetests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("filetests");
    let update = std::env::var_os("ATTAR_UPDATE_FILETESTS").is_some_and(|v| v == "1");
    let summary = attar_tests::filetest::run_all(&root, update).expect("the files can be read");
    #[expect(clippy::print_stderr, reason = "skipped tests are reported, never silently passed")]
    for skipped in &summary.skipped {
        eprintln!("skipped: {skipped}");
    }
    let failures = summary.failures.join("\n\n");
    assert!(
        summary.failures.is_empty(),
        "{} of {} failed\n\n{failures}",
        summary.failures.len(),
        summary.tests
    );
    assert!(summary.tests > 0, "no filetests found");
}
