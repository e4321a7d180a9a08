/* Printing JSON. */
#include <math.h>
#include <stdio.h>

#include "runner.h"

void pk_json_string(const char *text) {
  putchar('"');
  for (; *text; text++) {
    unsigned char c = (unsigned char)*text;
    if (c < 0x20)
      printf("\\u%04x", c);
    else if (c == '"' || c == '\\')
      printf("\\%c", c);
    else
      putchar(c);
  }
  putchar('"');
}

/* Nine digits give a float32 back exactly; JSON has no NaN. */
void pk_json_number(double value) {
  if (isfinite(value))
    printf("%.9g", value);
  else
    fputs("null", stdout);
}
