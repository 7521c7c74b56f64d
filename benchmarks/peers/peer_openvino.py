"""OpenVINO GenAI: peer_openvino.py FOLDER THREADS [f32]. The folder holds openvino_model.xml and config.json."""

import sys
from itertools import pairwise

import numpy as np
import openvino as ov
import openvino_genai as genai
from worker import serve


def main() -> None:
    folder, threads = sys.argv[1], int(sys.argv[2])
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 4096
    scheduler.cache_size = 2
    scheduler.enable_prefix_caching = False
    options: dict[str, object] = {
        "INFERENCE_NUM_THREADS": threads,
        "KV_CACHE_PRECISION": "u8",
        "ATTENTION_BACKEND": "PA",
    }
    if "f32" in sys.argv[3:]:  # what it chooses by itself on a processor without bf16 arithmetic
        options["INFERENCE_PRECISION_HINT"] = "f32"
    options["scheduler_config"] = scheduler
    pipeline = genai.LLMPipeline(folder, "CPU", **options)
    config = genai.GenerationConfig()
    config.set_eos_token_id(0)  # there is no tokenizer to ask; it is ignored
    config.ignore_eos = True
    config.do_sample = False

    def run(prompts: list[list[int]], new_tokens: int) -> list[float]:
        config.max_new_tokens = new_tokens
        ids = np.array(prompts, np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        raw = pipeline.generate(inputs, config).perf_metrics.raw_metrics
        first = raw.m_times_to_first_token[0] / 1e6  # microseconds
        times = raw.m_new_token_times  # milliseconds, one per step of the batch
        return [first, *((b - a) / 1e3 for a, b in pairwise(times))]

    serve({"openvino": ov.__version__, "openvino-genai": genai.__version__}, run)


main()
