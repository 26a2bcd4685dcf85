"""Tests of what needs no peer: `python3 -m unittest discover benches/peers`."""

import unittest

import bar
import report
import run


def outcome(samples, **more):
    runs = [
        {
            "contestant": contestant,
            "threads": 2,
            "round": n,
            "others": others,
            "load_seconds": 0.5,
            "system": "s",
            "results": [{"test": test, "variant": variant, "samples": [value]}],
        }
        for n, (contestant, test, variant, value, others) in enumerate(samples)
    ]
    base = {"machine": {"cpu": "c", "cores": 2}, "model": "smollm2", "absent": {}, "rounds": 1, "quiet": 0.2, "samples": runs}
    return base | more


class Report(unittest.TestCase):
    def test_names_of_tests(self):
        for name, kind, tokens, depth, rows in [
            ("pp512", "pp", 512, 0, 1),
            ("tg128", "tg", 128, 0, 1),
            ("tg128@4096", "tg", 128, 4096, 1),
            ("tg128x4", "tg", 128, 0, 4),
        ]:
            got = run.parse_test(name)
            self.assertEqual([got[k] for k in ("name", "kind", "tokens", "depth", "rows")], [name, kind, tokens, depth, rows])
        for wrong in ("xx12", "pp", "tg128@x", "pp-5", "tg12y"):
            with self.assertRaises(SystemExit):
                run.parse_test(wrong)

    def test_the_faster_variant_stands_and_quiet_samples_count(self):
        fa = "flash attention "
        samples = [("llama/Q4_0", "tg128", fa + "off", v, 0.0) for v in (100, 110, 120)]
        samples += [("llama/Q4_0", "tg128", fa + "off", 10, 1.0)]
        samples += [("llama/Q4_0", "tg128", fa + "on", 90, 0.0)]
        samples += [("attar/n4", "tg128", "", 330, 0.0)] * 3
        summary = report.summarize(outcome(samples))
        off = next(m for m in summary["medians"] if m["variant"] == fa + "off")
        self.assertEqual((off["median"], off["quiet"], off["all"], off["stands"]), (110, 3, 4, True))
        row = summary["bar"][2][0]
        self.assertEqual((row["peer"], row["ratio"], row["verdict"], row["quiet"]), ("llama/Q4_0", 3.0, "aim reached", True))

    def test_a_noisy_run_says_so(self):
        samples = [("llama/Q8_0", "tg128", "", 100, 1.0), ("attar/w8", "tg128", "", 190, 0.0)]
        done = outcome(samples)
        summary = report.summarize(done)
        row = summary["bar"][2][1]
        self.assertEqual((row["ratio"], row["verdict"], row["quiet"]), (1.9, "reached", False))
        self.assertIn("but others computed meanwhile", report.markdown(done, summary))

    def test_what_is_missing_is_named(self):
        done = outcome([("attar/n4", "pp512", "", 5000, 0.0)], absent={"openvino/int4": "no wheel"})
        summary = report.summarize(done)
        verdicts = [row["verdict"] for row in summary["bar"][2]]
        self.assertIn("not measured: openvino/int4", verdicts)
        self.assertIn("- openvino/int4: no wheel", report.markdown(done, summary))

    def test_ratios_that_must_be_small(self):
        row = bar.Row("w", "p", 1.2, 1.0, "ms", 1.3, 1.15, True)
        self.assertEqual(row.verdict, "reached")
        self.assertEqual(bar.Row("w", "p", 1.4, 1.0, "ms", 1.3, 1.15, True).verdict, "missed")

    def test_bandwidth_of_the_larger_shape(self):
        samples = [("attar/n4", "tg64", "", 40.0, 0.0)] * 3
        done = outcome(samples, model="1b", bandwidth={"2": [60e9, 61e9, 20e9]}, weight_bytes=1.2e9)
        row = report.summarize(done)["bar"][2][-1]
        self.assertAlmostEqual(row["ratio"], 0.8)


if __name__ == "__main__":
    unittest.main()
