//! Answers a prompt from an artifact: `cargo run --release -p attar-runtime --example generate -- model.attar "Hello"`.

use attar_runtime::{Control, GenerateOptions, Message, Model, OpenOptions, SessionOptions};
use std::io::{Write, stdout};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, file, prompt] = args.as_slice() else { return Err("usage: generate FILE PROMPT".into()) };
    let model = Model::open(file, &OpenOptions::default())?;
    let chat = model.chat_template()?.render(&[Message::new("user", prompt)], true)?;
    let tokens = model.tokenizer()?.encode(&chat, false)?;
    let mut session = model.session(&SessionOptions::default())?;
    let options = GenerateOptions { max_tokens: Some(128), ..GenerateOptions::default() };
    let answer = session.generate(&tokens, &options, |piece| {
        let mut out = stdout().lock();
        match out.write_all(piece.text.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => Control::Continue,
            Err(_) => Control::Stop,
        }
    })?;
    let rate = answer.timings.decode_rate();
    writeln!(stdout(), "\n[{}, {} tokens, {rate:.1} tokens/s]", answer.finish.name(), answer.tokens.len())?;
    Ok(())
}
