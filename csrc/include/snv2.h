/* The C interface: a network from a file, for C and every language that calls C.
 *
 *   snv2_network* network = snv2_load("net.snv2", 0);
 *   if (network == NULL) fprintf(stderr, "%s\n", snv2_error());
 *   snv2_run(network, pixels, 1, 224, 224, scores);
 *   snv2_destroy(network);
 *
 * Nothing is thrown across it. One call at a time for each network. */
#ifndef SNV2_H
#define SNV2_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SNV2_C_API __attribute__((visibility("default")))
#else
#define SNV2_C_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct snv2_network snv2_network;

typedef enum snv2_status {
  SNV2_OK = 0,
  SNV2_INVALID_ARGUMENT = 1, /* an argument does not fit */
  SNV2_FAILED = 2            /* no memory, or the network is in use */
} snv2_status;

typedef enum snv2_dtype { SNV2_FLOAT32 = 0, SNV2_FLOAT16 = 1, SNV2_BFLOAT16 = 2 } snv2_dtype;
typedef enum snv2_layout { SNV2_CONTIGUOUS = 0, SNV2_CHANNELS_LAST = 1 } snv2_layout;

/* A dense map [batch, channels, height, width] in the caller's memory. */
typedef struct snv2_map {
  void* data;
  int32_t dtype;  /* snv2_dtype */
  int32_t layout; /* snv2_layout */
  int64_t batch, channels, height, width;
} snv2_map;

/* Version of this library. */
SNV2_C_API const char* snv2_version(void);

/* What went wrong in this thread's last call that failed; valid until the next one. */
SNV2_C_API const char* snv2_error(void);

/* A network from a file, or NULL. threads 0: as many as this process may use. */
SNV2_C_API snv2_network* snv2_load(const char* path, int threads);

/* The same from memory, which is read in place where it is aligned to 64 bytes: it must neither
 * change nor go while the network lives. */
SNV2_C_API snv2_network* snv2_view(const void* data, size_t size, int threads);

/* NULL is nothing to destroy. */
SNV2_C_API void snv2_destroy(snv2_network* network);

/* N, C, H and W by default; C is the only one to be had. */
SNV2_C_API snv2_status snv2_input_shape(const snv2_network* network, int64_t shape[4]);

/* How many maps a run writes; the last is the output. */
SNV2_C_API size_t snv2_result_count(const snv2_network* network);

/* Shape of one of them for an input; a classifier's is [N, classes, 1, 1]. */
SNV2_C_API snv2_status snv2_result_shape(const snv2_network* network, size_t result, int64_t batch,
                                         int64_t height, int64_t width, int64_t shape[4]);

/* Names of classes, if the file has them: 0 and NULL otherwise. */
SNV2_C_API size_t snv2_class_count(const snv2_network* network);
SNV2_C_API const char* snv2_class_name(const snv2_network* network, size_t index);

/* JSON about where the network comes from. */
SNV2_C_API const char* snv2_about(const snv2_network* network);

/* One result of float32, from float32 [N, C, H, W]. */
SNV2_C_API snv2_status snv2_run(snv2_network* network, const float* x, int64_t batch,
                                int64_t height, int64_t width, float* result);

/* The same from bytes [N, H, W, C], where the file has a normalization. */
SNV2_C_API snv2_status snv2_run_images(snv2_network* network, const uint8_t* x, int64_t batch,
                                       int64_t height, int64_t width, float* result);

/* All results, of any dtype and layout; dtypes are x's. */
SNV2_C_API snv2_status snv2_run_maps(snv2_network* network, const snv2_map* x,
                                     const snv2_map* results, size_t result_count);

#ifdef __cplusplus
}
#endif

#endif /* SNV2_H */
