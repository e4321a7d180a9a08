/* Opening a model, one step, one prediction.
 *
 * Everything that can be prepared is prepared in pocktvm_open: DLTensors and argument lists point
 * at their final addresses, so a step is a loop over a table of (kernel, arguments). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

static char open_error[1024];

int pk_fail(pocktvm *m, int status, const char *format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(m ? m->error : open_error, sizeof open_error, format, list);
  va_end(list);
  return status;
}

const char *pocktvm_last_error(const pocktvm *m) { return m ? m->error : open_error; }

const pocktvm_plan_info *pocktvm_plan(const pocktvm *m) {
  return m ? &m->plan : &pk_the_model.plan;
}

/* --- open --- */

static int map_frozen_file(pocktvm *m) {
  char path[4096];
  if (pk_library_folder(path, sizeof path - 64))
    return pk_fail(m, POCKTVM_IO, "cannot tell where this library lies");
  strcat(strcat(path, "/"), pk_the_model.frozen_file);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  off_t nbytes = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
  if (nbytes != pk_the_model.frozen_bytes) {
    if (fd >= 0) close(fd);
    return pk_fail(m, POCKTVM_BAD_FILE, "%s is missing or truncated; build the artifact again", path);
  }
  void *data = mmap(NULL, (size_t)nbytes, PROT_READ, MAP_PRIVATE, fd, 0);
  close(fd);
  if (data == MAP_FAILED) return pk_fail(m, POCKTVM_IO, "%s: %s", path, strerror(errno));
  m->frozen = data;
  m->frozen_mapped_bytes = nbytes;
  return POCKTVM_OK;
}

static int open_frozen(pocktvm *m) {
  const pk_model *model = &pk_the_model;
  m->frozen = model->frozen;
  if (model->frozen_file) {
    int status = map_frozen_file(m);
    if (status) return status;
  }
  pk_prefault_code();
  pk_prefault_stack();
  pk_prefault(m->frozen, model->frozen_bytes);
  return POCKTVM_OK;
}

static int open_arena(pocktvm *m, const pocktvm_options *options) {
  int64_t need = m->plan.arena_bytes, fast = m->plan.fast_bytes;
  if (options->fast && fast) {
    if ((uintptr_t)options->fast % 64 || options->fast_bytes < fast)
      return pk_fail(m, POCKTVM_NO_MEMORY, "the fast memory given has %lld bytes at %p; this model "
                     "needs %lld bytes aligned to 64", (long long)options->fast_bytes,
                     options->fast, (long long)fast);
    m->fast = options->fast;
    need -= fast;
  }
  if (options->arena) {
    if ((uintptr_t)options->arena % 64 || options->arena_bytes < need)
      return pk_fail(m, POCKTVM_NO_MEMORY, "the arena given has %lld bytes at %p; this model needs "
                     "%lld bytes aligned to 64", (long long)options->arena_bytes, options->arena,
                     (long long)need);
    m->arena = options->arena;
    if (!m->fast) m->fast = m->arena + need - fast;
    return POCKTVM_OK;
  }
  void *data = mmap(NULL, (size_t)need, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
  if (data == MAP_FAILED)
    return pk_fail(m, POCKTVM_NO_MEMORY, "cannot map the arena of %lld bytes: %s; build with a "
                   "smaller --batch or a --budget", (long long)need, strerror(errno));
#ifdef MADV_HUGEPAGE
  madvise(data, (size_t)need, MADV_HUGEPAGE); /* advice only; fewer TLB misses where it is taken */
#endif
  m->arena = data;
  m->mapped_bytes = need;
  if (!m->fast) m->fast = m->arena + need - fast;
  return POCKTVM_OK;
}

static int reserve(pocktvm *m, pk_bound *bound, const pk_program *program) {
  bound->program = program;
  if (!program) return POCKTVM_OK;
  bound->tensors = calloc((size_t)program->n_views + 1, sizeof *bound->tensors);
  bound->args = calloc((size_t)program->n_args + 1, sizeof *bound->args);
  if (!bound->tensors || !bound->args)
    return pk_fail(m, POCKTVM_NO_MEMORY, "no memory for the tables of '%s'", program->name);
  return POCKTVM_OK;
}

static char *address_of(const pocktvm *m, const pk_view *view) {
  int64_t split = m->plan.arena_bytes - m->plan.fast_bytes;
  if (view->space == PK_FROZEN) return (char *)(uintptr_t)m->frozen + view->offset;
  return view->offset < split ? m->arena + view->offset : m->fast + (view->offset - split);
}

static void bind(pocktvm *m, pk_bound *bound) {
  const pk_program *program = bound->program;
  if (!program) return;
  for (int32_t i = 0; i < program->n_views; i++) {
    const pk_view *view = &program->views[i];
    bound->tensors[i] = (pk_dltensor){
        .data = address_of(m, view),
        .device = {1, 0},
        .ndim = view->ndim,
        .dtype = view->dtype,
        .shape = view->shape,
    };
  }
  for (int32_t i = 0; i < program->n_args; i++) {
    bound->args[i].type_index = PK_ANY_DLTENSOR;
    bound->args[i].v.pointer = &bound->tensors[program->args[i]];
  }
}

static int choose_threads(int asked) {
  if (pk_the_model.gpu) return 1;
  int online = pk_online_cpus(), most = pk_the_model.default_threads;
  if (asked > 0) return asked > 256 ? 256 : asked;
  return most > 0 && most < online ? most : online;
}

static int open_all(pocktvm *m, const pocktvm_options *options) {
  int status;
  m->pool = pk_pool_open(choose_threads(options->threads), options->pin);
  if (!m->pool) return pk_fail(m, POCKTVM_NO_MEMORY, "no memory for the threads");
  m->plan.threads = pk_pool_threads(m->pool);
  if ((status = reserve(m, &m->step, pk_the_model.step))) return status;
  if ((status = reserve(m, &m->predict, pk_the_model.predict))) return status;
  if ((status = pk_reserve_selections(m))) return status;
  if (options->checkpoint && (status = pk_lock(m, options->checkpoint))) return status;
  if ((status = open_frozen(m))) return status;
  m->plan.rss_open_bytes = pk_resident_bytes();
  if ((status = open_arena(m, options))) return status;
  bind(m, &m->step);
  bind(m, &m->predict);
  if (pk_the_model.gpu && (status = pk_the_model.gpu->api->open(m))) return status;
  if ((status = pk_load_initial(m, options->weights))) return status;
  return pk_send_state(m);
}

int pocktvm_open(const pocktvm_options *options, pocktvm **out) {
  static const pocktvm_options none;
  *out = NULL;
  pocktvm *m = calloc(1, sizeof *m);
  if (!m) return pk_fail(NULL, POCKTVM_NO_MEMORY, "no memory for a handle");
  m->plan = pk_the_model.plan;
  m->lock_fd = -1;
  if (!options) options = &none;
  m->call_ns = options->call_ns;
  m->plan.seed = options->seed;
  int status = open_all(m, options);
  if (status) {
    memcpy(open_error, m->error, sizeof open_error);
    pocktvm_close(m);
    return status;
  }
  *out = m;
  return POCKTVM_OK;
}

void pocktvm_close(pocktvm *m) {
  if (!m) return;
  pk_unlock(m);
  if (m->device) pk_the_model.gpu->api->close(m);
  pk_pool_close(m->pool);
  if (m->mapped_bytes) munmap(m->arena, (size_t)m->mapped_bytes);
  if (m->frozen_mapped_bytes)
    munmap((void *)(uintptr_t)m->frozen, (size_t)m->frozen_mapped_bytes);
  free(m->chosen);
  free(m->step.tensors);
  free(m->step.args);
  free(m->predict.tensors);
  free(m->predict.args);
  free(m);
}

/* --- running --- */

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* beta**n by squaring: libm's pow may differ between targets in the last place */
static double power(double beta, int64_t n) {
  double result = 1;
  for (; n; n >>= 1, beta *= beta)
    if (n & 1) result *= beta;
  return result;
}

static uint64_t splitmix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

/* What tells the masks of one step from those of another (reference/dropout.py: step_seed). */
static uint32_t dropout_seed(const pocktvm *m) {
  return (uint32_t)(splitmix(splitmix(m->plan.seed) + (uint64_t)m->plan.steps + 1) >> 32);
}

/* --- a device with memory of its own --- */

static int push(pocktvm *m, int64_t offset, int64_t nbytes) {
  return m->device ? pk_the_model.gpu->api->push(m, offset, nbytes) : POCKTVM_OK;
}

static int pull(pocktvm *m, int64_t offset, int64_t nbytes) {
  return m->device ? pk_the_model.gpu->api->pull(m, offset, nbytes) : POCKTVM_OK;
}

int pk_send_state(pocktvm *m) {
  int status = push(m, 0, pk_the_model.persistent_bytes);
  if (!status) m->host_newer = m->device_newer = 0;
  return status;
}

int pk_fetch_state(pocktvm *m) {
  if (!m->device || !m->device_newer) return POCKTVM_OK;
  int status = pull(m, 0, pk_the_model.persistent_bytes);
  if (!status) m->device_newer = 0;
  return status;
}

static int set_scalars(pocktvm *m, const pk_program *program, double lr) {
  for (int32_t i = 0; i < program->n_scalars; i++) {
    const pk_scalar *scalar = &program->scalars[i];
    double value = lr;
    if (scalar->formula == PK_SCALAR_BIAS_CORRECTION)
      value = 1 - power(scalar->beta, m->plan.steps + 1);
    *(float *)(m->arena + scalar->offset) = (float)value;
    if (scalar->formula == PK_SCALAR_DROPOUT_SEED) {
      uint32_t seed = dropout_seed(m);
      memcpy(m->arena + scalar->offset, &seed, sizeof seed);
    }
    int status = push(m, scalar->offset, sizeof(float));
    if (status) return status;
  }
  return POCKTVM_OK;
}

static int64_t input_bytes(const pocktvm_input *input) {
  int64_t nbytes = 4;
  for (int32_t i = 0; i < input->ndim; i++) nbytes *= input->shape[i];
  return nbytes;
}

static int set_inputs(pocktvm *m, const pk_program *program, const pocktvm_array *inputs) {
  for (int32_t i = 0; i < program->n_inputs; i++) {
    const pk_program_input *input = &program->inputs[i];
    if (input->offset == PK_NOWHERE) continue;
    int status = pk_copy_input(m, &m->plan.inputs[input->index], &inputs[i],
                               m->arena + input->offset);
    if (status) return status;
  }
  if (m->host_newer) {
    int status = pk_send_state(m);
    if (status) return status;
  }
  for (int32_t i = 0; m->device && i < program->n_inputs; i++) {
    const pk_program_input *input = &program->inputs[i];
    if (input->offset == PK_NOWHERE) continue;
    int status = push(m, input->offset, input_bytes(&m->plan.inputs[input->index]));
    if (status) return status;
  }
  return POCKTVM_OK;
}

static int run_calls(pocktvm *m, const pk_bound *bound, int64_t *call_ns) {
  const pk_program *program = bound->program;
  if (m->device) return pk_the_model.gpu->api->run(m, program, call_ns);
  pk_use_pool(m->pool);
  int64_t before = call_ns ? now_ns() : 0;
  for (int32_t i = 0; i < program->n_calls; i++) {
    const pk_call *call = &program->calls[i];
    pk_any result = {0};
    if (call->kernel(NULL, bound->args + call->first_arg, call->n_args, &result))
      return pk_fail(m, POCKTVM_KERNEL, "%s: kernel %d failed: %s; this is a bug of the compiler",
                     program->name, (int)i, pk_kernel_error());
    if (call_ns) {
      int64_t now = now_ns();
      call_ns[i] += now - before;
      before = now;
    }
  }
  return POCKTVM_OK;
}

int pocktvm_step(pocktvm *m, const pocktvm_array *inputs, double lr, float *loss) {
  const pk_program *program = m->step.program;
  if (!program) return pk_fail(m, POCKTVM_BAD_INPUT, "this artifact has no training step");
  int status = set_inputs(m, program, inputs);
  if (status) return status;
  if ((status = set_scalars(m, program, lr))) return status;
  if ((status = run_calls(m, &m->step, m->call_ns))) return status;
  if ((status = pull(m, program->loss_offset, sizeof *loss))) return status;
  m->device_newer = 1;
  m->plan.steps++;
  if (loss) memcpy(loss, m->arena + program->loss_offset, sizeof *loss);
  return POCKTVM_OK;
}

int pocktvm_predict(pocktvm *m, const pocktvm_array *inputs, float *output) {
  const pk_program *program = m->predict.program;
  if (!program || program->output_offset == PK_NOWHERE)
    return pk_fail(m, POCKTVM_BAD_INPUT, "this artifact has no predict");
  int status = set_inputs(m, program, inputs);
  if (status || (status = run_calls(m, &m->predict, NULL))) return status;
  if ((status = pull(m, program->output_offset, m->plan.output_size * (int64_t)sizeof *output)))
    return status;
  memcpy(output, m->arena + program->output_offset, (size_t)m->plan.output_size * sizeof *output);
  return POCKTVM_OK;
}

int pk_has_name(const pk_tensor *tensor, const char *name) {
  if (strcmp(tensor->name, name) == 0) return 1;
  for (const char *const *alias = tensor->aliases; *alias; alias++)
    if (strcmp(*alias, name) == 0) return 1;
  return 0;
}

static const char *const KINDS[] = {"trained", "optimizer", "selection"};

int pocktvm_tensor(pocktvm *m, const char *name, pocktvm_tensor_view *view) {
  for (int32_t i = 0; i < m->plan.n_tensors; i++) {
    const pk_tensor *tensor = &pk_the_model.tensors[i];
    if (!pk_has_name(tensor, name)) continue;
    int status = pk_fetch_state(m);
    if (status) return status;
    m->host_newer = m->device != NULL;
    *view = (pocktvm_tensor_view){
        .name = tensor->name,
        .kind = KINDS[tensor->kind],
        .data = (float *)(m->arena + tensor->offset),
        .ndim = tensor->ndim,
        .size = tensor->size,
    };
    memcpy(view->shape, tensor->shape, (size_t)tensor->ndim * sizeof *view->shape);
    memcpy(view->strides, tensor->strides, (size_t)tensor->ndim * sizeof *view->strides);
    return POCKTVM_OK;
  }
  return pk_fail(m, POCKTVM_BAD_INPUT, "no trained tensor is called '%s'", name);
}
