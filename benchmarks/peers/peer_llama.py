"""llama.cpp through llama-cpp-python's C interface: peer_llama.py FILE.gguf THREADS."""

import sys
from time import perf_counter

import llama_cpp as lc
from worker import serve

_MOST = 4096  # tokens of all sequences together


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
    options = lc.llama_context_default_params()
    options.n_ctx = _MOST
    options.n_batch = options.n_ubatch = 512
    options.n_seq_max = 8
    options.kv_unified = True
    options.n_threads = options.n_threads_batch = threads
    context = lc.llama_init_from_model(model, options)
    memory = lc.llama_get_memory(context)
    sampler = lc.llama_sampler_init_greedy()
    batch = lc.llama_batch_init(512, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:
        """rows: (token, position, sequence, whether its logits are wanted)."""
        for start in range(0, len(rows), 512):
            part = rows[start : start + 512]
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            assert lc.llama_decode(context, batch) == 0

    def run(prompts: list[list[int]], new_tokens: int) -> list[float]:
        lc.llama_memory_clear(memory, False)
        seconds, begin = [], perf_counter()
        tokens = []
        if len(prompts) == 1:
            ids = prompts[0]
            decode([(t, i, 0, i == len(ids) - 1) for i, t in enumerate(ids)])
            tokens = [lc.llama_sampler_sample(sampler, context, -1)]
        else:
            # One prompt after the other: each one's last row must still be the last batch's when it is sampled.
            for s, ids in enumerate(prompts):
                decode([(t, i, s, i == len(ids) - 1) for i, t in enumerate(ids)])
                tokens.append(lc.llama_sampler_sample(sampler, context, -1))
        for step in range(new_tokens):
            seconds.append(perf_counter() - begin)
            if step == new_tokens - 1:
                break
            begin = perf_counter()
            decode([(t, len(prompts[s]) + step, s, True) for s, t in enumerate(tokens)])
            tokens = [lc.llama_sampler_sample(sampler, context, s) for s in range(len(prompts))]
        return seconds

    info = lc.llama_print_system_info().decode()
    serve({"llama-cpp-python": lc.__version__, "build": info}, run)


main()
