// Sees what llama.cpp does to a cache's buffer outside of graphs: restore, copy, clear, free.
#pragma once

struct ggml_backend_buffer;

namespace louver {

// Wraps the buffer's interface, once, so that the registry learns of every write and of its end.
void watch_buffer(ggml_backend_buffer * buffer);

}  // namespace louver
