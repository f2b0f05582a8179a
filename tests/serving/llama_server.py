"""llama.cpp's server from the package xllamacpp, which has no command of its own, with the options of llama-server."""

import argparse
import threading

import xllamacpp

parser = argparse.ArgumentParser()
for option in ("model", "lora", "host", "port"):
    parser.add_argument(f"--{option}", required=True)
given = parser.parse_args()
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.hostnames, parameters.port = given.model, [given.host], int(given.port)
adapter = xllamacpp.CommonAdapterLoraInfo()
adapter.path, adapter.scale = given.lora, 1.0
parameters.lora_adapters = [adapter]
server = xllamacpp.Server(parameters)
threading.Event().wait()
