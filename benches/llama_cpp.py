"""llama.cpp on a GPU, for benches/gpu.py: a GGUF of a shape with random codes, Q4_0 for the layers and Q8_0 for embedding and head,
timed by `llama-batched-bench`. Needs numpy and the `gguf` package."""

import json
import subprocess

import numpy as np

# Of a block of 32: bytes behind the f16 scale.
CODE_BYTES = {"Q4_0": 16, "Q8_0": 32}


def write_gguf(path, config, tensors):
    """`tensors` are those of the checkpoint: name, shape, spread of its numbers or None for a norm."""
    import gguf
    from peers.checkpoint import add_shape

    writer = gguf.GGUFWriter(path, "llama")
    add_shape(writer, config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    random = np.random.Generator(np.random.SFC64(2))
    for name, dims, spread in tensors:
        name = names.get_name(name, try_suffixes=(".weight",))
        if spread is None:
            writer.add_tensor(name, np.ones(dims, np.float32))
            continue
        kind = "Q4_0" if name.startswith("blk.") else "Q8_0"
        rows, blocks = dims[0], dims[1] // 32
        packed = np.empty((rows, blocks, 2 + CODE_BYTES[kind]), np.uint8)
        # So that the numbers have that spread: codes are spread by 4.6, or by 74.
        scale = np.float16(spread / (4.6 if kind == "Q4_0" else 74))
        packed[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
        packed[..., 2:] = random.integers(0, 256, packed[..., 2:].shape, np.uint8)
        packed = packed.reshape(rows, -1)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def has_cuda(program):
    """Whether it shows a GPU of CUDA; without one it would time the CPU."""
    said = subprocess.run([str(program), "--list-devices"], capture_output=True, text=True)
    return "CUDA0" in said.stdout + said.stderr


def bench(program, path, context, prompt, batches, tokens, seconds, options=()):
    """Lines of the benchmark, a dictionary each: behind `prompt` tokens, which sequences share, `tokens` of each sequence."""
    command = [program, "-m", path, "-c", context, "-b", 2048, "-ub", 2048, "-npp", prompt, "-ntg", tokens]
    command += ["-npl", ",".join(map(str, batches)), "-pps", "--output-format", "jsonl", *options]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=max(seconds, 1))
    # It logs everything, its results too.
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith('{"n_kv_max"')]
    if done.returncode != 0 or not lines:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return [json.loads(line) for line in lines]


def steps(program, path, contexts, batches, prompt, remaining, options=()):
    """Milliseconds of a step by batch and context, and of a prompt, as far as the `remaining()` seconds allow. Everything is done
    twice in a process, and the second time counts."""
    out, tokens = {}, 32

    def timed(what, *arguments):
        if remaining() <= 0:
            return None
        try:
            return bench(program, path, *arguments, remaining(), options)[-1]
        except (RuntimeError, subprocess.TimeoutExpired) as problem:
            print(f"  llama.cpp, {what}: {problem}")
            return None

    # In calls of their own: what has no room must not cost the rest.
    for context in contexts:
        for batch in batches:
            what = f"batch {batch}, context {context}"
            said = timed(what, batch * (context + tokens), context, [batch, batch], tokens)
            if said:
                out[batch, context] = said["t_tg"] / tokens * 1e3
    said = timed(f"prompt of {prompt}", prompt + 64, prompt, [1, 1], 1)
    return out, said and said["t_pp"] * 1e3
