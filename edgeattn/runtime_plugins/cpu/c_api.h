/* The plain C door of both libraries. Raise EDGEATTN_ABI_VERSION with every incompatible change of it; the Python
 * package compares it with edgeattn.runtime_plugins.cpu.ABI_VERSION before it trusts a library. */
#pragma once

#include <stddef.h>

#define EDGEATTN_ABI_VERSION 1

#if defined(_WIN32)
#define EDGEATTN_EXPORT __declspec(dllexport)
#else
#define EDGEATTN_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int batch, channels, height, width;
  int num_heads, key_dim, kernel, window_height, window_width;
  float scale;
} edgeattn_cga_size;

EDGEATTN_EXPORT const char* edgeattn_version(void);
EDGEATTN_EXPORT int edgeattn_abi_version(void);

/* Comma-separated names, slowest first. */
EDGEATTN_EXPORT const char* edgeattn_compiled_isas(void);
EDGEATTN_EXPORT const char* edgeattn_best_isa(void);

/* 1 if this machine runs the named instruction set, else 0 (unknown names too). */
EDGEATTN_EXPORT int edgeattn_runs_here(const char* isa);

/* CascadedGroupAttention on `threads` threads. Weights in their ONNX layouts; `isa` null or "" means the active one
 * (best, or EDGEATTN_CPU_ISA). Returns 0, or 1 with a message of at most `message_size` bytes. */
EDGEATTN_EXPORT int edgeattn_cga_f32(const char* isa, int threads, const edgeattn_cga_size* size, const float* x,
                                     const float* qkv_weight, const float* qkv_bias, const float* dw_weight,
                                     const float* dw_bias, const float* attention_bias, const float* proj_weight,
                                     const float* proj_bias, float* y, char* message, size_t message_size);

#ifdef __cplusplus
}
#endif
