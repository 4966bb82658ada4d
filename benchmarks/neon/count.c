// A plugin of QEMU 7 or 8 in user mode: how often each instruction word was executed, as lines
// "WORD COUNT" on the standard error output when the program ends. Counts at the call of a
// program's snv2_count_from_here() begin again.
//
// Declares what it uses of qemu-plugin.h, which Debian's packages do not have.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef void (*on_translation)(uint64_t id, struct qemu_plugin_tb* tb);
typedef void (*on_execution)(unsigned vcpu, void* data);
typedef void (*at_exit)(uint64_t id, void* data);
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, on_translation callback);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb* tb, on_execution callback,
                                          int flags, void* data);
void qemu_plugin_register_atexit_cb(uint64_t id, at_exit callback, void* data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* tb);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb* tb, size_t index);
const void* qemu_plugin_insn_data(const struct qemu_plugin_insn* insn);
int qemu_plugin_version = 1;

// A run of instructions that is entered at its first.
struct block {
  struct block* next;
  uint64_t count;
  size_t size;
  uint32_t words[];
};
static struct block* blocks;

// hint #0x5a, which does nothing and stands in no compiled code.
static const uint32_t kFromHere = 0xd5032b5f;

static void executed(unsigned vcpu, void* data) {
  (void)vcpu;
  struct block* block = data;
  for (size_t i = 0; i < block->size; ++i) {
    if (block->words[i] != kFromHere) continue;
    for (struct block* each = blocks; each != NULL; each = each->next) each->count = 0;
    return;
  }
  ++block->count;
}

static void translated(uint64_t id, struct qemu_plugin_tb* tb) {
  (void)id;
  const size_t size = qemu_plugin_tb_n_insns(tb);
  struct block* block = malloc(sizeof *block + size * sizeof block->words[0]);
  if (block == NULL) abort();
  block->next = blocks, block->count = 0, block->size = size;
  for (size_t i = 0; i < size; ++i) {
    memcpy(&block->words[i], qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), 4);
  }
  blocks = block;
  qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, 0, block);
}

static void finished(uint64_t id, void* data) {
  (void)id, (void)data;
  for (struct block* block = blocks; block != NULL; block = block->next) {
    if (block->count == 0) continue;
    for (size_t i = 0; i < block->size; ++i) {
      fprintf(stderr, "%08" PRIx32 " %" PRIu64 "\n", block->words[i], block->count);
    }
  }
}

int qemu_plugin_install(uint64_t id, const void* info, int count, char** arguments) {
  (void)info, (void)count, (void)arguments;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, finished, NULL);
  return 0;
}
