/* A plugin for qemu-aarch64: what a program executes, and how a Cortex-A72's data caches would fare.

   Arguments: out=FILE  where a line of totals goes whenever the program asks for the monotonic
                        clock, and at its end: instructions fma_vector fma_other loads stores
                        l1_misses l2_misses
              caches=1  model the caches too (slower)

   The prototypes are written out because few distributions ship qemu-plugin.h; they are its C
   interface from version 1 on. API is the version to claim; from 3 on instructions are copied.

   Caches: 32 KiB 2-way and 1 MiB 16-way, lines of 64 bytes, least recently used goes; no prefetch,
   no write buffer. Loads and stores both count. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef API
#define API 1
#endif
#define EXPORT __attribute__((visibility("default")))

typedef uint64_t plugin_id;
typedef uint32_t access_info;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum { NO_REGISTERS = 0, LOADS_AND_STORES = 3, CLOCK_GETTIME = 113, MONOTONIC = 1 };

typedef void on_translation(plugin_id, struct qemu_plugin_tb *);
typedef void on_execution(unsigned, void *);
typedef void on_access(unsigned, access_info, uint64_t, void *);
typedef void on_exit_(plugin_id, void *);
typedef void on_syscall(plugin_id, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                        uint64_t, uint64_t, uint64_t, uint64_t);

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, on_translation *);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, on_execution *, int, void *);
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *, on_access *, int, int, void *);
void qemu_plugin_register_vcpu_syscall_cb(plugin_id, on_syscall *);
void qemu_plugin_register_atexit_cb(plugin_id, on_exit_ *, void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
#if API >= 3
size_t qemu_plugin_insn_data(const struct qemu_plugin_insn *, void *, size_t);
#else
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
#endif

EXPORT int qemu_plugin_version = API;

typedef struct {
    uint64_t instructions, fma_vector, fma_other, loads, stores;
} counts;

static counts total;
static uint64_t l1_misses, l2_misses, tick;
static int model_caches;
static FILE *out;

/* --- the caches --- */

enum { LINE_BITS = 6, L1_SETS = 256, L1_WAYS = 2, L2_SETS = 1024, L2_WAYS = 16 };

typedef struct {
    uint64_t line, used; /* line + 1, so that 0 is empty */
} way;

static way l1[L1_SETS][L1_WAYS], l2[L2_SETS][L2_WAYS];

static int hit(way *set, int ways, uint64_t line)
{
    way *oldest = set;
    tick++;
    for (way *w = set; w < set + ways; w++) {
        if (w->line == line + 1) {
            w->used = tick;
            return 1;
        }
        if (w->used < oldest->used) oldest = w;
    }
    oldest->line = line + 1;
    oldest->used = tick;
    return 0;
}

static void accessed(unsigned cpu, access_info info, uint64_t address, void *unused)
{
    uint64_t line = address >> LINE_BITS;
    if (hit(l1[line % L1_SETS], L1_WAYS, line)) return;
    l1_misses++;
    l2_misses += !hit(l2[line % L2_SETS], L2_WAYS, line);
}

/* --- the instructions: Arm ARM (DDI 0487), C4.1 --- */

static int is_vector_fma(uint32_t word) /* FMLA, FMLS on single precision, by vector or by lane */
{
    return (word & 0xbf60fc00) == 0x0e20cc00 || (word & 0xbfc0b400) == 0x0f801000;
}

static int is_scalar_fma(uint32_t word) { return (word & 0xff000000) == 0x1f000000; }

static int is_load(uint32_t word) /* of an instruction of the load and store group */
{
    int literal = (word & 0x3b000000) == 0x18000000;
    int general_register = (word & 0x3c000000) == 0x38000000;
    return literal || (word >> 22 & 1) || (general_register && (word >> 23 & 1));
}

static void classify(uint32_t word, counts *block)
{
    int four_lanes = word >> 30 & 1;
    block->instructions++;
    if (is_vector_fma(word) && four_lanes)
        block->fma_vector++;
    else if (is_vector_fma(word) || is_scalar_fma(word))
        block->fma_other++;
    else if ((word & 0x0a000000) == 0x08000000)
        *(is_load(word) ? &block->loads : &block->stores) += 1;
}

static uint32_t word_of(const struct qemu_plugin_insn *instruction)
{
    uint32_t word = 0;
#if API >= 3
    qemu_plugin_insn_data(instruction, &word, sizeof word);
#else
    memcpy(&word, qemu_plugin_insn_data(instruction), sizeof word);
#endif
    return word;
}

/* --- what qemu calls --- */

static void executed(unsigned cpu, void *block_counts)
{
    const counts *block = block_counts;
    total.instructions += block->instructions;
    total.fma_vector += block->fma_vector;
    total.fma_other += block->fma_other;
    total.loads += block->loads;
    total.stores += block->stores;
}

static void translated(plugin_id id, struct qemu_plugin_tb *tb)
{
    counts *block = calloc(1, sizeof *block); /* as long as the code it was translated to: for ever */
    if (!block) abort();
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); i++) {
        struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(tb, i);
        classify(word_of(instruction), block);
        if (model_caches)
            qemu_plugin_register_vcpu_mem_cb(instruction, accessed, NO_REGISTERS, LOADS_AND_STORES,
                                             NULL);
    }
    qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, NO_REGISTERS, block);
}

static void print_totals(void)
{
    fprintf(out, "%" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64
            "\n", total.instructions, total.fma_vector, total.fma_other, total.loads, total.stores,
            l1_misses, l2_misses);
}

static void system_call(plugin_id id, unsigned cpu, int64_t number, uint64_t a, uint64_t b,
                        uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h)
{
    if (number == CLOCK_GETTIME && a == MONOTONIC) print_totals(); /* others are of processor time */
}

static void ended(plugin_id id, void *unused)
{
    print_totals();
    fclose(out);
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
    for (int i = 0; i < argc; i++) {
        if (strncmp(argv[i], "out=", 4) == 0) out = fopen(argv[i] + 4, "w");
        if (strcmp(argv[i], "caches=1") == 0) model_caches = 1;
    }
    if (!out) return 1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, system_call);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
