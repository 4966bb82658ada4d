/* The C interface, compiled as C. */
#include <string.h>

#include "snv2.h"

#define CLASSES 5

int run_from_c(const void* data, size_t size, const float* x, float* scores) {
  int64_t shape[4];
  snv2_map map = {NULL, SNV2_FLOAT32, SNV2_CONTIGUOUS, 1, 3, 19, 23};
  snv2_map result = {NULL, SNV2_FLOAT32, SNV2_CONTIGUOUS, 1, CLASSES, 1, 1};
  float again[CLASSES];
  snv2_network* network = snv2_view(data, size, 2);
  if (network == NULL) return 1;
  if (snv2_input_shape(network, shape) != SNV2_OK || shape[1] != 3 || shape[3] != 23) return 2;
  if (snv2_result_count(network) != 1) return 3;
  if (snv2_result_shape(network, 0, 4, 9, 9, shape) != SNV2_OK) return 4;
  if (shape[0] != 4 || shape[1] != CLASSES || shape[2] != 1 || shape[3] != 1) return 5;
  if (snv2_class_count(network) != CLASSES || strcmp(snv2_class_name(network, 1), "dog") != 0) {
    return 6;
  }
  if (snv2_class_name(network, CLASSES) != NULL || strstr(snv2_about(network), "small") == NULL) {
    return 7;
  }
  if (snv2_run(network, x, 1, 19, 23, scores) != SNV2_OK) return 8;
  map.data = (void*)x;
  result.data = again;
  if (snv2_run_maps(network, &map, &result, 1) != SNV2_OK) return 9;
  if (memcmp(again, scores, sizeof again) != 0) return 10;
  map.dtype = 77;
  if (snv2_run_maps(network, &map, &result, 1) != SNV2_INVALID_ARGUMENT) return 11;
  if (strcmp(snv2_error(), "x: unknown dtype or layout") != 0) return 12;
  if (snv2_run(network, x, 1, 0, 23, scores) != SNV2_INVALID_ARGUMENT) return 13;
  if (snv2_run(NULL, x, 1, 19, 23, scores) != SNV2_INVALID_ARGUMENT) return 14;
  if (snv2_result_count(NULL) != 0 || snv2_about(NULL) != NULL) return 15;
  if (snv2_view("short", 5, 1) != NULL || snv2_version()[0] == '\0') return 16;
  snv2_destroy(network);
  snv2_destroy(NULL);
  return 0;
}
