//! `attar_plugin.h` is what the Rust declarations say.

use std::path::Path;

/// The header, generated.
fn generated(source: &Path) -> String {
    let text = std::fs::read_to_string(source).expect("the declarations");
    let about: Vec<&str> = text
        .lines()
        .take_while(|l| l.starts_with("//!"))
        .map(|l| l.trim_start_matches("//!").strip_prefix(' ').unwrap_or(""))
        .collect();
    let about = about
        .join("\n * ")
        .replace("[`attar_plugin_entry`](crate::entry::attar_plugin_entry)", "attar_plugin_entry");
    let config = cbindgen::Config {
        language: cbindgen::Language::C,
        header: Some(format!("/*\n{}\n */", plain(&about))),
        include_guard: Some("ATTAR_PLUGIN_H".to_owned()),
        no_includes: true,
        sys_includes: vec!["stddef.h".to_owned(), "stdint.h".to_owned()],
        cpp_compat: true,
        style: cbindgen::Style::Both,
        documentation: true,
        documentation_style: cbindgen::DocumentationStyle::Doxy,
        export: cbindgen::ExportConfig {
            include: vec!["AttarHost".to_owned(), "AttarPlugin".to_owned()],
            ..cbindgen::ExportConfig::default()
        },
        trailer: Some(
            "#ifdef __cplusplus\nextern \"C\" {\n#endif\n\n/**\n * The one function that a plugin exports. `host` stays valid for as \
             long as the library is loaded; `NULL` refuses to work.\n */\nconst AttarPlugin *attar_plugin_entry(const AttarHost \
             *host);\n\n#ifdef __cplusplus\n}\n#endif"
                .to_owned(),
        ),
        ..cbindgen::Config::default()
    };
    let bindings =
        cbindgen::Builder::new().with_config(config).with_src(source).generate().expect("a header");
    let mut out = Vec::new();
    bindings.write(&mut out);
    plain(&String::from_utf8(out).expect("UTF-8"))
}

/// Without the brackets of Rust's links.
fn plain(text: &str) -> String {
    text.replace("[`", "`").replace("`]", "`")
}

#[test]
fn the_header_is_fresh() {
    let sdk = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sdk");
    let (source, header) = (sdk.join("src/abi.rs"), sdk.join("include/attar_plugin.h"));
    let generated = generated(&source);
    if std::env::var_os("ATTAR_UPDATE_DOCS").is_some_and(|v| v == "1") {
        std::fs::write(&header, &generated).expect("the header is written");
    }
    let kept = std::fs::read_to_string(&header).unwrap_or_default();
    assert!(kept == generated, "attar_plugin.h is stale; ATTAR_UPDATE_DOCS=1 rewrites it");
    // Every function of the table is in it.
    assert_eq!(
        kept.matches("(*").count(),
        attar_plugin_host::FUNCTIONS + 1,
        "one pointer for each function, and for run"
    );
}
