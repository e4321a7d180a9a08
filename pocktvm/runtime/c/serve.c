/* A trainer behind a pipe, for callers that cannot load the library themselves.
 *
 * A request is one line and the bytes it announces; an answer is "ok N\n" or "error STATUS N\n"
 * and N bytes. Arrays are raw, in the order and shape of the plan's inputs, their dtypes named:
 *   info                      -> JSON
 *   step LR DTYPE…  + arrays  -> one float32        (DTYPE: a number of pocktvm_dtype)
 *   predict DTYPE…  + arrays  -> float32 output     (labels left off)
 *   get NAME                  -> float32, torch's layout
 *   set NAME        + float32 -> nothing
 *   select N NAME   + int32   -> nothing
 *   resample SEED             -> nothing
 *   save PATH | load PATH     -> nothing
 *   quit, or the end of input
 * Standard output is kept for answers alone: descriptor 1 is pointed at standard error. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runner.h"

typedef struct {
  const pk_api *api;
  pocktvm *model;
  const pocktvm_plan_info *plan;
  FILE *out;
  pocktvm_array *arrays;
  float *output;
} server;

static int answer(server *s, const void *data, size_t nbytes) {
  fprintf(s->out, "ok %zu\n", nbytes);
  fwrite(data, 1, nbytes, s->out);
  return fflush(s->out);
}

static int refuse(server *s, int status, const char *message) {
  fprintf(s->out, "error %d %zu\n%s", status, strlen(message), message);
  return fflush(s->out);
}

static int refuse_last(server *s, int status) {
  return refuse(s, status, s->api->last_error(s->model));
}

/* Reads the arrays that a line announces: -1 when the pipe broke, 1 when a dtype is unknown. */
static int read_arrays(server *s, char *dtypes, int labels) {
  char *save = NULL, *word = strtok_r(dtypes, " ", &save);
  for (int32_t i = 0; i < s->plan->n_inputs; i++) {
    if (s->plan->inputs[i].is_label && !labels) continue;
    s->arrays[i].dtype = word ? atoi(word) : -1;
    size_t item = (size_t)pk_dtype_bytes(s->arrays[i].dtype);
    if (!item) return 1;
    size_t nbytes = item * (size_t)pk_input_size(&s->plan->inputs[i]);
    if (fread((void *)(uintptr_t)s->arrays[i].data, 1, nbytes, stdin) != nbytes) return -1;
    word = strtok_r(NULL, " ", &save);
  }
  return 0;
}

static int do_step(server *s, char *rest) {
  char *dtypes;
  float loss;
  double lr = strtod(rest, &dtypes);
  int status = read_arrays(s, dtypes, 1);
  if (status) return status < 0 ? -1 : refuse(s, POCKTVM_BAD_INPUT, "unknown dtype");
  status = s->api->step(s->model, s->arrays, lr, &loss);
  return status ? refuse_last(s, status) : answer(s, &loss, sizeof loss);
}

static int do_predict(server *s, char *rest) {
  int status = read_arrays(s, rest, 0);
  if (status) return status < 0 ? -1 : refuse(s, POCKTVM_BAD_INPUT, "unknown dtype");
  status = s->api->predict(s->model, s->arrays, s->output);
  if (status) return refuse_last(s, status);
  return answer(s, s->output, (size_t)s->plan->output_size * sizeof *s->output);
}

static void transfer(const pocktvm_tensor_view *view, float *flat, int store) {
  int64_t index[POCKTVM_MAX_DIMS] = {0}, at = 0;
  for (int64_t i = 0; i < view->size; i++) {
    if (store)
      view->data[at] = flat[i];
    else
      flat[i] = view->data[at];
    for (int32_t d = view->ndim; d-- > 0;) {
      at += view->strides[d];
      if (++index[d] < view->shape[d]) break;
      at -= view->shape[d] * view->strides[d];
      index[d] = 0;
    }
  }
}

static int do_tensor(server *s, const char *name, int store) {
  pocktvm_tensor_view view;
  int status = s->api->tensor(s->model, name, &view);
  if (!status && store && strcmp(view.kind, "selection") == 0) return -1; /* select does that */
  if (status) return store ? -1 : refuse_last(s, status); /* how much to skip is unknown */
  size_t nbytes = (size_t)view.size * sizeof(float);
  float *flat = malloc(nbytes + 1);
  if (!flat) return refuse(s, POCKTVM_NO_MEMORY, "no memory for the tensor");
  if (store && fread(flat, 1, nbytes, stdin) != nbytes) {
    free(flat);
    return -1;
  }
  transfer(&view, flat, store);
  int broken = answer(s, flat, store ? 0 : nbytes);
  free(flat);
  return broken;
}

static int do_select(server *s, char *rest) {
  char *name;
  long count = strtol(rest, &name, 10);
  if (*name != ' ' || count < 0 || count > (1 << 24)) return -1;
  int32_t *indices = malloc((size_t)count * sizeof *indices + 1);
  if (!indices) return -1;
  int whole = fread(indices, sizeof *indices, (size_t)count, stdin) == (size_t)count;
  int status = whole ? s->api->select(s->model, name + 1, indices, (int32_t)count) : 0;
  free(indices);
  return !whole ? -1 : status ? refuse_last(s, status) : answer(s, "", 0);
}

static int do_resample(server *s, const char *rest) {
  int status = s->api->resample(s->model, strtoull(rest, NULL, 10));
  return status ? refuse_last(s, status) : answer(s, "", 0);
}

static int do_info(server *s) {
  char text[256];
  const pocktvm_plan_info *now = s->api->plan(s->model);
  int n = snprintf(text, sizeof text,
                   "{\"steps\": %lld, \"threads\": %d, \"rss_open_bytes\": %lld}",
                   (long long)now->steps, (int)now->threads, (long long)now->rss_open_bytes);
  return answer(s, text, (size_t)n);
}

static int do_file(server *s, int (*call)(pocktvm *, const char *), const char *path) {
  int status = call(s->model, path);
  return status ? refuse_last(s, status) : answer(s, "", 0);
}

/* 0: go on; anything else ends the session. */
static int serve_line(server *s, char *line) {
  char *rest = strchr(line, ' ');
  rest = rest ? (*rest = 0, rest + 1) : line + strlen(line);
  if (strcmp(line, "step") == 0) return do_step(s, rest);
  if (strcmp(line, "predict") == 0) return do_predict(s, rest);
  if (strcmp(line, "get") == 0) return do_tensor(s, rest, 0);
  if (strcmp(line, "set") == 0) return do_tensor(s, rest, 1);
  if (strcmp(line, "select") == 0) return do_select(s, rest);
  if (strcmp(line, "resample") == 0) return do_resample(s, rest);
  if (strcmp(line, "save") == 0) return do_file(s, s->api->save, rest);
  if (strcmp(line, "load") == 0) return do_file(s, s->api->load, rest);
  if (strcmp(line, "info") == 0) return do_info(s);
  return 1;
}

static int allocate(server *s) {
  s->arrays = calloc((size_t)s->plan->n_inputs + 1, sizeof *s->arrays);
  s->output = malloc((size_t)(s->plan->output_size > 0 ? s->plan->output_size : 1) * sizeof(float));
  if (!s->arrays || !s->output) return -1;
  for (int32_t i = 0; i < s->plan->n_inputs; i++) /* 8: the widest dtype */
    if (!(s->arrays[i].data = malloc((size_t)pk_input_size(&s->plan->inputs[i]) * 8))) return -1;
  return 0;
}

static void release(server *s) {
  for (int32_t i = 0; s->arrays && i < s->plan->n_inputs; i++)
    free((void *)(uintptr_t)s->arrays[i].data);
  free(s->arrays);
  free(s->output);
  s->api->close(s->model);
  fclose(s->out);
}

int pk_serve(const pk_api *api, const pocktvm_options *options) {
  char line[8192];
  int answers = dup(1);
  server s = {.api = api, .plan = api->plan(NULL), .out = fdopen(answers, "wb")};
  if (!s.out || dup2(2, 1) < 0 || allocate(&s)) return pk_complain("cannot set up the pipe");
  int status = api->open(options, &s.model);
  if (status) {
    refuse(&s, status, api->last_error(NULL));
    release(&s);
    return 1;
  }
  do_info(&s); /* the greeting: the model is open */
  while (fgets(line, sizeof line, stdin)) {
    line[strcspn(line, "\n")] = 0;
    if (serve_line(&s, line)) break;
  }
  release(&s);
  return 0;
}
