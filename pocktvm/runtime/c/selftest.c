/* Runs the recorded batch on a fresh state and compares with what the reference recorded. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "runner.h"

/* |difference| allowed, relative to max(|value|, 0.01) */
static const double TOLERANCE = 1e-4;

static double error_of(double value, double expected) {
  double scale = fabs(expected) > 0.01 ? fabs(expected) : 0.01;
  return fabs(value - expected) / scale;
}

/* Outputs are compared on the scale of the largest one: a single logit may be near zero. */
static int check_output(const pk_api *api, pocktvm *model, const pocktvm_selftest *test,
                        double *worst) {
  int64_t size = api->plan(model)->output_size;
  float *output = malloc((size_t)size * sizeof *output + 1);
  double largest = 0.01;
  if (!output) return pk_complain("no memory for the output");
  if (api->predict(model, test->inputs, output)) {
    free(output);
    return pk_complain("%s", api->last_error(model));
  }
  for (int64_t i = 0; i < size; i++)
    if (fabsf(test->output[i]) > largest) largest = fabsf(test->output[i]);
  for (int64_t i = 0; i < size; i++) {
    double error = fabs((double)output[i] - (double)test->output[i]) / largest;
    if (!(error <= *worst)) *worst = error;
  }
  free(output);
  return 0;
}

static int report(const pk_settings *settings, int passed, double worst_output, double worst_loss) {
  if (settings->json) {
    printf("{\"selftest\": \"%s\", \"loss_error\": ", passed ? "pass" : "fail");
    pk_json_number(worst_loss);
    fputs(", \"output_error\": ", stdout);
    pk_json_number(worst_output);
    printf(", \"tolerance\": %g}\n", TOLERANCE);
  } else {
    printf("%s: losses within %.1e, output within %.1e of the reference (allowed %.0e)\n",
           passed ? "PASS" : "FAIL", worst_loss, worst_output, TOLERANCE);
  }
  return passed ? 0 : 1;
}

int pk_selftest(const pk_api *api, const pk_settings *settings, const pocktvm_options *options) {
  pocktvm *model;
  const pocktvm_selftest *test = api->plan(NULL)->selftest;
  double worst_output = 0, worst_loss = 0;
  if (!test) return pk_complain("this artifact carries no self-test");
  if (api->open(options, &model)) return pk_complain("%s", api->last_error(NULL));
  int code = test->output ? check_output(api, model, test, &worst_output) : 0;
  for (int32_t i = 0; i < test->n_losses && !code; i++) {
    float loss;
    if (api->step(model, test->inputs, test->lr, &loss)) {
      code = pk_complain("%s", api->last_error(model));
      break;
    }
    double error = error_of((double)loss, (double)test->losses[i]);
    if (!(error <= worst_loss)) worst_loss = error; /* NaN counts as the worst */
  }
  api->close(model);
  if (code) return code;
  int passed = worst_loss <= TOLERANCE && worst_output <= TOLERANCE;
  return report(settings, passed, worst_output, worst_loss);
}
