/* pocktvm-run: trains an artifact. It needs the device's libc and nothing else. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#include "runner.h"

static const char USAGE[] =
    "usage: pocktvm-run ARTIFACT [options]      (a folder, or its model.so)\n"
    "  --data F.safetensors   samples; keys are the inputs' names and y; default: one made-up batch\n"
    "  --steps N              total number of steps, resumed ones included\n"
    "  --lr X                 learning rate; default: the one stored at build\n"
    "  --threads N            default: every core\n"
    "  --pin                  each thread keeps to a core of its own, the fastest first\n"
    "  --seed S               order of the samples, dropout's masks\n"
    "  --save CKPT            checkpoint, written at the end\n"
    "  --save-every 1s|500ms|N   … and as often as this (N: steps)\n"
    "  --resume CKPT          go on from a checkpoint\n"
    "  --resample EPOCHS      other channels learn after as many epochs (built with --resample)\n"
    "  --json                 the result as one JSON object on stdout\n"
    "  --progress             'progress STEP TOTAL LOSS MS' on stderr, up to 20 a second\n"
    "  --profile              milliseconds of every kernel, in the JSON\n"
    "  --selftest             compare with the recorded losses: PASS or FAIL\n"
    "  --serve                a trainer on stdin and stdout (see serve.c)\n"
    "  --die-with-parent      end when the parent process ends\n"
    "  --emulated             this is an emulator: resident sets mean nothing\n";

int pk_complain(const char *format, ...) {
  va_list list;
  va_start(list, format);
  fputs("pocktvm-run: ", stderr);
  vfprintf(stderr, format, list);
  fputc('\n', stderr);
  va_end(list);
  return 1;
}

static void __attribute__((noreturn)) usage_error(const char *option, const char *value) {
  fprintf(stderr, "pocktvm-run: %s %s is not understood\n%s", option, value ? value : "", USAGE);
  exit(2);
}

static double number(const char *option, const char *text, double low, double high) {
  char *end = NULL;
  double value = text ? strtod(text, &end) : 0;
  if (!text || end == text || *end || !(value >= low && value <= high)) usage_error(option, text);
  return value;
}

static int64_t integer(const char *option, const char *text, int64_t low, int64_t high) {
  char *end = NULL;
  errno = 0;
  int64_t value = text ? strtoll(text, &end, 10) : 0;
  if (!text || end == text || *end || errno || value < low || value > high)
    usage_error(option, text);
  return value;
}

static void save_interval(pk_settings *o, const char *text) {
  char *end = NULL;
  double value = text ? strtod(text, &end) : 0;
  if (!text || end == text || !(value > 0)) usage_error("--save-every", text);
  if (strcmp(end, "s") == 0)
    o->save_seconds = value;
  else if (strcmp(end, "ms") == 0)
    o->save_seconds = value * 1e-3;
  else if (strcmp(end, "m") == 0)
    o->save_seconds = value * 60;
  else
    o->save_steps = integer("--save-every", text, 1, INT64_MAX);
}

static int take_flag(pk_settings *o, const char *name) {
  const struct {
    const char *name;
    int *flag;
  } flags[] = {{"--json", &o->json},         {"--selftest", &o->selftest},
               {"--serve", &o->serve},       {"--profile", &o->profile},
               {"--progress", &o->progress}, {"--emulated", &o->emulated},
               {"--pin", &o->pin},
               {"--die-with-parent", &o->die_with_parent}};
  for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
    if (strcmp(name, flags[i].name) == 0) return *flags[i].flag = 1;
  return 0;
}

static void take_value(pk_settings *o, const char *name, const char *value) {
  if (!value) usage_error(name, "without a value");
  if (strcmp(name, "--data") == 0)
    o->data = value;
  else if (strcmp(name, "--steps") == 0)
    o->steps = integer(name, value, 0, 1000000000);
  else if (strcmp(name, "--lr") == 0)
    o->lr = number(name, value, 0, 1e30);
  else if (strcmp(name, "--threads") == 0)
    o->threads = (int)integer(name, value, 1, 256);
  else if (strcmp(name, "--seed") == 0)
    o->seed = (uint64_t)integer(name, value, 0, INT64_MAX);
  else if (strcmp(name, "--save") == 0)
    o->save = value;
  else if (strcmp(name, "--save-every") == 0)
    save_interval(o, value);
  else if (strcmp(name, "--resample") == 0)
    o->resample_epochs = integer(name, value, 1, 1000000);
  else if (strcmp(name, "--resume") == 0)
    o->resume = value;
  else
    usage_error(name, "");
}

static pk_settings parse(int argc, char **argv) {
  pk_settings o = {.steps = -1, .lr = -1};
  for (int i = 1; i < argc; i++) {
    if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
      fputs(USAGE, stdout);
      exit(0);
    }
    if (strncmp(argv[i], "--", 2) != 0) {
      if (o.artifact) usage_error(argv[i], "");
      o.artifact = argv[i];
    } else if (!take_flag(&o, argv[i])) {
      take_value(&o, argv[i], argv[i + 1]);
      i++;
    }
  }
  if (!o.artifact) usage_error("ARTIFACT", "(missing)");
  if ((o.save_seconds > 0 || o.save_steps) && !o.save) usage_error("--save-every", "without --save");
  return o;
}

static void die_with_parent(void) {
#ifdef __linux__
  pid_t parent = getppid();
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) exit(1); /* it ended before we asked */
#endif
}

int main(int argc, char **argv) {
  pk_settings settings = parse(argc, argv);
  pk_api api;
  char folder[4096], weights[4200];
  if (settings.die_with_parent) die_with_parent();
  signal(SIGPIPE, SIG_IGN);
  if (pk_load_library(settings.artifact, &api, folder, sizeof folder)) return 1;
  snprintf(weights, sizeof weights, "%s/weights.safetensors", folder);
  pocktvm_options options = {.weights = weights, .threads = settings.threads, .pin = settings.pin};
  if (settings.serve) options.seed = settings.seed;
  if (settings.serve) return pk_serve(&api, &options);
  if (settings.selftest) return pk_selftest(&api, &settings, &options);
  return pk_train(&api, &settings, &options);
}
