"""llama.cpp's server from the package xllamacpp: python llama_server.py FILE.gguf prints its address and serves."""

import sys
import threading

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], 8192, 4
server = xllamacpp.Server(params)
print("at", server.listening_address, flush=True)
threading.Event().wait()
