// Registers with ggml-cpu as an extra buffer type, whose tensor traits are offered every op in every thread.
#include <dlfcn.h>

#include <mutex>
#include <string>

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "ggml/attention_op.h"
#include "ggml/cuda_extension.h"
#include "ggml/registry.h"
#include "louver/isa.h"
#include "louver/runtime.h"
#include "traits.h"

namespace louver {
namespace {

class AttentionTraits final : public ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        // Claiming nothing makes ggml add what its own kernel needs to this, so that either of us can run in the buffer.
        size = attention_work_size(n_threads, op);
        return false;
    }
    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        return !params->use_ref && attention_forward(params, op);
    }
};

// An op that writes into a cache: seen, and left to ggml.
class WriteTraits final : public ggml::cpu::tensor_traits {
    bool work_size(int, const ggml_tensor *, size_t &) override { return false; }
    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (params->ith == 0) {
            if (op->op == GGML_OP_SET_ROWS) {
                rows_written(op);
            } else {
                size_t span = ggml_row_size(op->type, op->ne[0]);
                for (int i = 1; i < GGML_MAX_DIMS; ++i) {
                    span += static_cast<size_t>(op->ne[i] - 1) * op->nb[i];
                }
                Registry::instance().written(op->data, span);
            }
        }
        return false;
    }

    static void rows_written(const ggml_tensor * op) {
        const ggml_tensor * index = op->src[1];
        for (int64_t i3 = 0; i3 < op->ne[3]; ++i3) {
            for (int64_t i2 = 0; i2 < op->ne[2]; ++i2) {
                for (int64_t i = 0; i < index->ne[0]; ++i) {
                    const std::byte * at = static_cast<const std::byte *>(index->data) + static_cast<size_t>(i) * index->nb[0] +
                                           static_cast<size_t>(i2 % index->ne[1]) * index->nb[1] +
                                           static_cast<size_t>(i3 % index->ne[2]) * index->nb[2];
                    const int64_t row = index->type == GGML_TYPE_I64 ? *reinterpret_cast<const int64_t *>(at)
                                                                     : *reinterpret_cast<const int32_t *>(at);
                    Registry::instance().written(static_cast<const std::byte *>(op->data) + static_cast<size_t>(row) * op->nb[1] +
                                                     static_cast<size_t>(i2) * op->nb[2] + static_cast<size_t>(i3) * op->nb[3],
                                                 ggml_row_size(op->type, op->ne[0]));
                }
            }
        }
    }
};

class BufferType final : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor *) override { return false; }  // no tensor ever lives in it
    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        if (op->op == GGML_OP_FLASH_ATTN_EXT) {
            return &attention_;
        }
        return Registry::instance().may_hold(op->data) ? &writes_ : nullptr;
    }
    AttentionTraits attention_;
    WriteTraits writes_;
};

ggml_backend_buffer_type_t buffer_type() {
    static BufferType * type = new BufferType();  // never destroyed, as ggml keeps the pointer
    static ggml_backend_buffer_type instance = {
        /* .iface   = */ {
            /* .get_name       = */ [](ggml_backend_buffer_type_t) { return "LOUVER"; },
            /* .alloc_buffer   = */ [](ggml_backend_buffer_type_t, size_t) -> ggml_backend_buffer_t { return nullptr; },
            /* .get_alignment  = */ [](ggml_backend_buffer_type_t) -> size_t { return 64; },
            /* .get_max_size   = */ nullptr,
            /* .get_alloc_size = */ nullptr,
            /* .is_host        = */ nullptr,
        },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ type,
    };
    return &instance;
}

std::string path_of(const void * symbol) {
    Dl_info info{};
    return dladdr(symbol, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : "";
}

}  // namespace

Libraries libraries() {
    Libraries l;
    l.pin_package_version = LOUVER_PIN_VERSION;
    l.pin_ggml_version = LOUVER_PIN_GGML_VERSION;
    l.pin_commit = LOUVER_PIN_COMMIT;
    l.ggml_version = ggml_version();
    l.commit = ggml_commit();
    l.ggml_cpu_path = path_of(reinterpret_cast<const void *>(&ggml_backend_cpu_reg));
    l.louver_path = path_of(reinterpret_cast<const void *>(&attach));
    return l;
}

void attach() {
    const Libraries l = libraries();
    if (l.ggml_version != l.pin_ggml_version || l.commit != l.pin_commit) {
        throw LibraryMismatch("built for ggml " + l.pin_ggml_version + " (" + l.pin_commit + "), but found ggml " +
                              l.ggml_version + " (" + l.commit + ") at " + l.ggml_cpu_path);
    }
    active_isa();
    static std::once_flag once;
    std::call_once(once, [] {
        // ggml copies the list for weight buffers on first use; ours holds no weights, so it joins after that.
        ggml_backend_reg_t reg = ggml_backend_cpu_reg();
        const auto get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
            ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts"));
        get(ggml_backend_reg_dev_get(reg, 0));
        auto & all = ggml_backend_cpu_get_extra_buffer_types();
        all.insert(all.begin(), buffer_type());
    });
    attach_cuda();
}

}  // namespace louver
