"""Writes a random checkpoint with LLaMA 7B's sizes, and measures the host memory while it is read onto eight devices.

python tests/interop/large_checkpoint.py write FOLDER [--layers 32]     (13.5 GB with all 32 layers)
python tests/interop/large_checkpoint.py load FOLDER                    (8 devices, fsdp, bfloat16)

On fake CPU devices the arrays themselves are in host memory; the overhead is what the process needs beyond them.
"""

import argparse
import json
import os
import pathlib
import threading
import time

import ml_dtypes
import numpy as np

DEVICES, GIB = 8, 1 << 30
WIDTH, HEADS, MLP, VOCAB = 4096, 32, 11008, 32000
SHARD_LAYERS = 4


def write(folder: pathlib.Path, layers: int) -> None:
    """Writes config.json, the shards and their index; one shard is in memory at a time."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        # Signs and mantissas are random, the size is that of trained weights: numbers of 1/128 to 1/64.
        bits = np.frombuffer(generator.bytes(2 * int(np.prod(shape))), np.uint16).reshape(shape)
        return (bits & 0x807F | 0x3C00).view(ml_dtypes.bfloat16)

    outside = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
    }
    inside = {f"self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
    inside |= {f"mlp.{name}_proj.weight": (MLP, WIDTH) for name in ("gate", "up")}
    inside |= {"mlp.down_proj.weight": (WIDTH, MLP)}
    inside |= {f"{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    groups = [outside] + [
        {f"model.layers.{i}.{name}": shape for i in range(start, min(start + SHARD_LAYERS, layers))
         for name, shape in inside.items()}
        for start in range(0, layers, SHARD_LAYERS)
    ]  # fmt: skip
    places = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: random(*shape) for name, shape in group.items()}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(group, file)
        print(f"{file}: {(folder / file).stat().st_size / GIB:.2f} GiB", flush=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


class MemoryWatch:
    """Records the peaks of the process's own memory and of all its pages, every 5 ms."""

    def __init__(self) -> None:
        self.anonymous = self.total = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(0.005):
            now = resident()
            self.anonymous = max(self.anonymous, now["RssAnon"])
            self.total = max(self.total, now["VmRSS"])


def resident() -> dict[str, int]:
    """Returns the process's memory in bytes, by the names of /proc/self/status."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("VmRSS", "RssAnon", "RssFile")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def load(folder: pathlib.Path) -> None:
    """Reads the folder, compares some rows with the file, and prints time and memory."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import safetensors

    from diffusion_lm.interop import huggingface
    from diffusion_lm.parallel.mesh import MeshSpec

    jax.block_until_ready([jax.device_put(np.ones(1), device) for device in jax.devices()])
    before, start = resident()["RssAnon"], time.perf_counter()
    with MemoryWatch() as watch:
        imported = huggingface.load(folder, param_dtype="bfloat16", dtype="bfloat16", mesh=MeshSpec(fsdp=DEVICES))
    seconds, held = time.perf_counter() - start, resident()["RssAnon"] - before
    leaves = jax.tree.leaves(imported.params)
    arrays = sum(leaf.nbytes for leaf in leaves)
    shards = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    query = imported.params["blocks"]["attention"]["query"]
    layer = query.shape[0] - 1
    name = f"model.layers.{layer}.self_attn.q_proj.weight"
    place = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    with safetensors.safe_open(folder / place, framework="numpy") as file:
        rows = file.get_slice(name)[WIDTH - 128 :]
    np.testing.assert_array_equal(np.asarray(query[layer, :, -1]), rows.T)
    print(f"{len(leaves)} arrays on {len(query.sharding.device_set)} devices, {seconds:.0f} s")
    for title, size in {
        "files": files,
        "arrays": arrays,
        "their shards on all devices": shards,
        "largest array": imported.report.largest_array,
        "peak of the reader's own buffers (its own count)": imported.report.peak_host,
        "memory of the process before": before,
        "memory of the process after the import, minus before": held,
        "peak of its own memory, less before": watch.anonymous - before,
        "peak beyond the shards": watch.anonymous - before - shards,
        "peak with the mapped pages of the files": watch.total,
    }.items():
        print(f"  {title}: {size / GIB:.3f} GiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("write", "load"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=32)
    given = parser.parse_args()
    if given.action == "write":
        write(given.folder, given.layers)
    else:
        load(given.folder)
