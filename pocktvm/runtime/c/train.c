/* The training loop of pocktvm-run. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "runner.h"

static volatile sig_atomic_t stop_signal;

static void on_signal(int number) { stop_signal = number; }

typedef struct {
  const pk_api *api;
  const pk_settings *settings;
  pocktvm *model;
  pk_source source;
  float *losses;
  double *step_ms, *step_cpu_ms; /* wall time; processor time of all threads */
  int64_t n_done; /* in this call */
  int64_t last_save_steps;
  double last_save_time, last_report_time, lr;
} session;

static double seconds_of(clockid_t clock) {
  struct timespec now;
  if (clock_gettime(clock, &now)) return 0;
  return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static double now_seconds(void) { return seconds_of(CLOCK_MONOTONIC); }

static int64_t steps_done(const session *s) { return s->api->plan(s->model)->steps; }

static int complain_last(const session *s) {
  return pk_complain("%s", s->api->last_error(s->model));
}

/* The library names a place in the batch; the user wants the sample in the file. */
static int complain_input(const session *s) {
  char rows[512] = "";
  if (!s->source.path) return complain_last(s);
  for (int32_t b = 0; b < s->source.plan->batch && strlen(rows) < 400; b++)
    snprintf(rows + strlen(rows), sizeof rows - strlen(rows), b ? ", %lld" : "%lld",
             (long long)s->source.rows[b]);
  return pk_complain("%s\n  the rows of this batch are samples %s of %s",
                     s->api->last_error(s->model), rows, s->source.path);
}

static int save(session *s) {
  s->last_save_time = now_seconds();
  s->last_save_steps = steps_done(s);
  return s->api->save(s->model, s->settings->save) ? complain_last(s) : 0;
}

static int save_if_due(session *s) {
  const pk_settings *o = s->settings;
  if (!o->save) return 0;
  int by_steps = o->save_steps && steps_done(s) - s->last_save_steps >= o->save_steps;
  int by_time = o->save_seconds > 0 && now_seconds() - s->last_save_time >= o->save_seconds;
  return by_steps || by_time ? save(s) : 0;
}

/* At most 20 lines a second: a small model makes thousands of steps in one. */
static void report(session *s, int64_t total, double ms) {
  double now = now_seconds();
  int64_t done = steps_done(s);
  if (!s->settings->progress || (done < total && now - s->last_report_time < 0.05)) return;
  s->last_report_time = now;
  fprintf(stderr, "progress %lld %lld %.9g %.3f\n", (long long)done, (long long)total,
          (double)s->losses[s->n_done - 1], ms);
}

static int check_resample(const session *s) {
  if (!s->settings->resample_epochs) return 0;
  if (!s->api->plan(s->model)->n_selections)
    return pk_complain("--resample: the channels that learn are fixed in this artifact; build it "
                       "with --resample to choose them");
  return s->source.path ? 0 : pk_complain("--resample counts epochs: give --data");
}

/* Between epochs, told by the number of steps done alone: a resumed run draws what the unbroken one
 * does. Drawing the same channels twice changes nothing. */
static int resample_if_due(session *s) {
  int64_t period = s->settings->resample_epochs * pk_source_epoch_steps(&s->source);
  int64_t done = steps_done(s);
  if (!period || !done || done % period) return 0;
  uint64_t round = (uint64_t)(done / period);
  int failed = s->api->resample(s->model, s->settings->seed + (round << 32));
  return failed ? complain_last(s) : 0;
}

static int one_step(session *s, int64_t total) {
  float loss = 0;
  if (resample_if_due(s)) return 1;
  if (pk_source_batch(&s->source, steps_done(s))) return 1;
  double cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID), before = now_seconds();
  int status = s->api->step(s->model, s->source.arrays, s->lr, &loss);
  double ms = (now_seconds() - before) * 1e3;
  cpu = (seconds_of(CLOCK_PROCESS_CPUTIME_ID) - cpu) * 1e3;
  if (status == POCKTVM_KERNEL) return complain_last(s), 3;
  if (status) return complain_input(s);
  s->losses[s->n_done] = loss;
  s->step_cpu_ms[s->n_done] = cpu;
  s->step_ms[s->n_done++] = ms;
  report(s, total, ms);
  return 0;
}

static int64_t total_steps(const session *s) {
  if (s->settings->steps >= 0) return s->settings->steps;
  return s->source.path ? pk_source_epoch_steps(&s->source) : 10;
}

static int loop(session *s, int64_t *call_ns) {
  int64_t total = total_steps(s), remaining = total - steps_done(s);
  size_t room = remaining > 0 ? (size_t)remaining : 1;
  s->losses = calloc(room, sizeof *s->losses);
  s->step_ms = calloc(room, sizeof *s->step_ms);
  s->step_cpu_ms = calloc(room, sizeof *s->step_cpu_ms);
  if (!s->losses || !s->step_ms || !s->step_cpu_ms)
    return pk_complain("no memory for %lld losses", (long long)total);
  s->last_save_time = now_seconds();
  s->last_save_steps = steps_done(s);
  while (steps_done(s) < total && !stop_signal) {
    /* the first step touches pages for the first time: no part of a profile where others follow */
    if (call_ns && s->n_done == 1) memset(call_ns, 0, sizeof *call_ns * (size_t)s->api->plan(s->model)->n_calls);
    int code = one_step(s, total);
    if (code || (code = save_if_due(s))) return code;
  }
  return s->settings->save ? save(s) : 0;
}

/* VmHWM: the largest resident set so far; 0 where the system does not say. */
static int64_t peak_bytes(void) {
  char line[256];
  long long kib = 0;
  FILE *status = fopen("/proc/self/status", "r");
  if (!status) return 0;
  while (fgets(line, sizeof line, status))
    if (sscanf(line, "VmHWM: %lld", &kib) == 1) break;
  fclose(status);
  return kib * 1024;
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *values, int64_t n) {
  if (!n) return 0;
  qsort(values, (size_t)n, sizeof *values, by_value);
  return n % 2 ? values[n / 2] : 0.5 * (values[n / 2 - 1] + values[n / 2]);
}

static void print_bytes(const char *key, int64_t value, int known) {
  if (known)
    printf(", \"%s\": %lld", key, (long long)value);
  else
    printf(", \"%s\": null", key);
}

/* Means over all steps but the first (see `loop`). */
static void print_profile(const session *s, const int64_t *call_ns) {
  const pocktvm_plan_info *plan = s->api->plan(s->model);
  double steps = (double)(s->n_done > 1 ? s->n_done - 1 : 1);
  fputs(", \"profile\": [", stdout);
  for (int32_t i = 0; i < plan->n_calls; i++) {
    fputs(i ? ", [" : "[", stdout);
    pk_json_string(plan->call_labels[i]);
    printf(", %.6f]", (double)call_ns[i] * 1e-6 / steps);
  }
  putchar(']');
}

static void print_json(const session *s, int64_t peak, const int64_t *call_ns) {
  const pocktvm_plan_info *plan = s->api->plan(s->model);
  int measured = peak && plan->rss_open_bytes && !s->settings->emulated;
  fputs("{\"losses\": [", stdout);
  for (int64_t i = 0; i < s->n_done; i++) {
    if (i) fputs(", ", stdout);
    pk_json_number((double)s->losses[i]);
  }
  printf("], \"steps\": %lld, \"step_ms_median\": ", (long long)plan->steps);
  pk_json_number(median(s->step_ms, s->n_done));
  fputs(", \"step_cpu_ms_median\": ", stdout);
  pk_json_number(median(s->step_cpu_ms, s->n_done));
  print_bytes("peak_rss_bytes", peak, measured);
  print_bytes("rss_open_bytes", plan->rss_open_bytes, measured);
  print_bytes("measured_bytes", peak - plan->rss_open_bytes, measured);
  print_bytes("arena_bytes", plan->arena_bytes, 1);
  print_bytes("lower_bound_bytes", plan->lower_bound_bytes, 1);
  print_bytes("total_bytes", plan->total_bytes, 1);
  printf(", \"threads\": %d, \"batch\": %d, \"lr\": ", (int)plan->threads, (int)plan->batch);
  pk_json_number(s->lr);
  fputs(", \"model\": ", stdout);
  pk_json_string(plan->model);
  fputs(", \"target\": ", stdout);
  pk_json_string(plan->target);
  printf(", \"emulated\": %s", s->settings->emulated ? "true" : "false");
  if (call_ns) print_profile(s, call_ns);
  puts("}");
}

static void print_summary(const session *s) {
  int64_t n = s->n_done;
  if (!n) {
    printf("nothing to do: %lld steps are already done\n", (long long)steps_done(s));
    return;
  }
  double ms = median(s->step_ms, n);
  printf("%lld steps, loss %.4f -> %.4f, %.*f ms a step, %d threads\n", (long long)n,
         (double)s->losses[0], (double)s->losses[n - 1], ms < 1 ? 4 : 2, ms,
         (int)s->api->plan(s->model)->threads);
}

static void catch_signals(void) {
  struct sigaction action = {.sa_handler = on_signal};
  sigaction(SIGTERM, &action, NULL);
  sigaction(SIGINT, &action, NULL);
  signal(SIGXFSZ, SIG_IGN); /* a file size limit then reads as a write error, not as our death */
}

static int train(session *s, const pocktvm_options *options) {
  if (s->api->open(options, &s->model)) return complain_last(s);
  if (s->settings->resume && s->api->load(s->model, s->settings->resume)) return complain_last(s);
  int code = check_resample(s);
  if (code || (code = loop(s, options->call_ns))) return code;
  int64_t peak = peak_bytes();
  if (s->settings->json)
    print_json(s, peak, options->call_ns);
  else
    print_summary(s);
  return fflush(stdout) ? pk_complain("cannot write the result") : stop_signal ? 128 + stop_signal : 0;
}

int pk_train(const pk_api *api, const pk_settings *settings, const pocktvm_options *options) {
  const pocktvm_plan_info *plan = api->plan(NULL);
  pocktvm_options all = *options;
  session s = {.api = api, .settings = settings, .lr = settings->lr >= 0 ? settings->lr : plan->lr};
  if (settings->profile) all.call_ns = calloc((size_t)plan->n_calls + 1, sizeof *all.call_ns);
  all.checkpoint = settings->save;
  all.seed = settings->seed;
  catch_signals();
  int code = pk_source_open(&s.source, settings->data, plan, settings->seed);
  if (!code) code = train(&s, &all);
  api->close(s.model);
  pk_source_close(&s.source);
  free(s.losses);
  free(s.step_ms);
  free(s.step_cpu_ms);
  free(all.call_ns);
  return code;
}
