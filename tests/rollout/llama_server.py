"""llama.cpp's server out of the wheel xllamacpp, with those options of llama-server that we give. Not a test module.

python llama_server.py FOLDER_OF_THE_WHEEL --model FILE [--lora FILE] --port N ...
"""

import argparse
import sys
import threading

sys.path.insert(0, sys.argv.pop(1))
import xllamacpp

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--lora", action="append", default=[])
parser.add_argument("--host", default="127.0.0.1")
for name, value in (("--port", 8080), ("--ctx-size", 512), ("--parallel", 1), ("--threads", 1)):
    parser.add_argument(name, type=int, default=value)
given = parser.parse_args()
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = given.model, given.ctx_size, given.parallel
params.hostnames, params.port = [given.host], given.port
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given.threads
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, 1.0) for file in given.lora]
params.warmup, params.kv_unified, params.n_gpu_layers, params.offline = False, False, 0, True
server = xllamacpp.Server(params)
threading.Event().wait()
