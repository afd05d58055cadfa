#!/usr/bin/env bash
# DPO, MODPO, soups, MOD and PARM on SmolLM2 between helpful and harmless: one table, one figure, held-out prompts.
# Pairs are the model's own answers to prompts of HH-RLHF, labelled by the package's two rewards; nothing but the comparison meets
# the test prompts.
# usage:    [HH=FOLDER] pipelines/preferences.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# needs:    helpful-base and harmless-base of HH-RLHF (MIT) as FOLDER/NAME.test.jsonl.gz, by default ../shared/data/hh_rlhf
# takes:    about 2 hours on 2 CPU cores that did other work too: bank 12 minutes, each training 13 to 22, comparison 16
# expect:   docs/results.md: hypervolume 1.90 for the soup, 1.85 MOD, 1.69 MODPO's three points, 1.75 PARM, 1.89 best-of-2, 1.00 the reference
source "$(dirname "$0")/common.sh"
source "$here/own_answers.bash"
if [ -n "$tiny" ]; then
  points=(--limit 4 --steps 2 --reference_samples 4 --best_of '[2]') parm=(--reward.fit.max_steps 3)
else
  points=(--samples 1) parm=()
fi

policies
for weight in 0.25 0.5 0.75; do
  run train modpo --model "$model" --pairs "$pairs" --dpo.objectives "[$second]" --modpo.margins "[$first=dpo:$out/$first/adapter]" \
    --modpo.weights "$weight,$(python3 -c "print(1 - $weight)")" "${dpo_first[@]}" --out "$out/modpo-$weight"
done
run train autoregressive --config "$here/../recipes/parm.yaml" --model "$model" --pairs "$pairs" --reward.objectives "$rewards" \
  "${parm[@]}" --out "$out/parm"
run compare --out "$out/compare" --model "$model" --prompts "$out/prompts/prompts.jsonl" "${sampling[@]}" "${points[@]}" \
  --rewards "$rewards" --judges "$judges" --methods "{soup: {soup: $tuned}, MOD: {mixing: $tuned}, PARM: {guides: ['$out/parm/adapter'], beta: 2.0}, \
MODPO: {policies: ['$out/modpo-0.25/adapter', '$out/modpo-0.5/adapter', '$out/modpo-0.75/adapter']}}"
