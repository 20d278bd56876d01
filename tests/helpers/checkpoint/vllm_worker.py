"""Run in vLLM's own environment: ``vllm_worker.py MODEL-FOLDER PROMPT-JSON OUT-JSON``; greedy tokens and log
p in fp32.
"""

import json
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, prompt, out = sys.argv[1:]
    tokens = json.loads(prompt)
    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        trust_remote_code=True,
        distributed_executor_backend="uni",
        max_model_len=128,
        max_num_seqs=2,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False, logprobs=0, prompt_logprobs=0
    )
    (request,) = llm.generate([{"prompt_token_ids": tokens}], sampling)
    (answer,) = request.outputs
    prompt_logps = [
        steps[token].logprob for token, steps in zip(tokens[1:], request.prompt_logprobs[1:], strict=True)
    ]
    logps = [steps[token].logprob for token, steps in zip(answer.token_ids, answer.logprobs, strict=True)]
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"tokens": list(answer.token_ids), "logps": [*prompt_logps, *logps]}, file)


if __name__ == "__main__":
    main()
