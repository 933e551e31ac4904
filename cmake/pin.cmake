# The one version of llama.cpp this project is built on and tested with: the copy that the source
# package of llama-cpp-python carries. Changing it means reading docs/llama-integration.md again.
set(LOUVER_PIN_PACKAGE llama-cpp-python)
set(LOUVER_PIN_VERSION 0.3.36)
set(LOUVER_PIN_FILE llama_cpp_python-0.3.36.tar.gz)
set(LOUVER_PIN_SHA256 832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e)
set(LOUVER_PIN_GGML_VERSION 0.25.3)
