#include "race_reports.h"

int main() { return run_all_tests_and_check_reports(); }
