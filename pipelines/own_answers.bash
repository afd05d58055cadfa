# Sourced by the pipelines on SmolLM2's own answers to HH-RLHF's prompts, which share them where OUT is the same: prompts, a bank of four
# answers to each, its rewards, and pairs. Sets: objectives, first, second, rewards, model, sampling, judges, pairs. Where `third` is
# set before, it is an objective too.
if [ -n "$tiny" ]; then
  run tiny --out "$out/tiny"
  objectives=(long readable) model=$out/tiny/model sources=hh:$out/tiny/hh.jsonl draw=() judges='[]'
  sampling=(--sampling.max_new_tokens 8 --sampling.top_k 12 --sampling.batch_size 16)
else
  HH=${HH:-$here/../../shared/data/hh_rlhf}
  objectives=(helpful harmless) model=smollm2 sources=hh:$HH/helpful-base.test.jsonl.gz,hh:$HH/harmless-base.test.jsonl.gz
  draw=(--max_words 50 --per_source 400) judges='[judge_helpful,judge_harmless]'
  sampling=(--sampling.max_new_tokens 40 --sampling.top_k 40 --sampling.batch_size 64)
fi
objectives+=(${third:+"$third"})
first=${objectives[0]} second=${objectives[1]} rewards="[$(IFS=,; echo "${objectives[*]}")]" pairs="[labelled:$out/pairs/pairs.jsonl]"

run prompts --out "$out/prompts" --sources "[$sources]" --single_turn true "${draw[@]}" \
  --shares '{"train": 0.8, "validation": 0.1, "test": 0.1}'
run sample --model "$model" --prompts "$out/prompts/prompts.jsonl" --samples 4 "${sampling[@]}" --out "$out/bank"
run score --run "$out/bank" --model "$model" --rewards "$rewards"
run label --run "$out/bank" --choice extremes --out "$out/pairs"

# DPO for each objective: OUT/OBJECTIVE/adapter, together `tuned`.
dpo=(--cache "$out/logprobs" --dpo.beta 0.5 --dpo.max_length 256 --dpo.lora.dropout 0 --dpo.fit.warmup 0.1 --dpo.fit.batch_size 8)
dpo_first=("${dpo[@]}" --dpo.test_share 0.1 --dpo.fit.learning_rate 2e-4 --dpo.fit.max_steps 36 --dpo.fit.accumulate 2 --dpo.fit.checkpoint_every 12)
[ -z "$tiny" ] || dpo_first+=(--dpo.lora.rank 2 --dpo.fit.max_steps 3 --dpo.test_share 0.3)
# OBJECTIVE=FOLDER of each objective, with the folder's name around it: `each scorer- /model` for OUT/scorer-OBJECTIVE/model.
each() {
  local name named=()
  for name in "${objectives[@]}"; do named+=("'$name=$out/$1$name$2'"); done
  (IFS=,; echo "[${named[*]}]")
}
tuned=$(each '' /adapter)
policies() {
  for name in "${objectives[@]}"; do
    run train dpo --model "$model" --pairs "$pairs" --dpo.objectives "[$name]" "${dpo_first[@]}" --out "$out/$name"
  done
}

asked=(--model "$model" --prompts "$out/prompts/prompts.jsonl")

# What else is learnt from them, by functions that a pipeline calls once it has changed what it wants of these settings.
if [ -n "$tiny" ]; then
  value=(--value.calibration_states 16 --value.state_features 2 --value.token_features 4)
  scorer=(--reward.fit.max_steps 2 --reward.test_share 0.3 --reward.layers 1 --reward.lora.rank 2 --reward.lora.blocks 1)
  trees=(--limit 6 --growth.layers 3 --shard 3)
  model_of_values=(--value.validation_share 0.34 --value.calibration_states 16 --value.fit.max_steps 2 --value.lora.rank 2)
  rounds=(--loop.rounds 2 --loop.prompts 4 --loop.samples 2 --loop.steps 2 --loop.sampling.max_new_tokens 8)
  ppo=(--loop.lora.rank 2) dpo_online=(--loop.weighted.rank 2 --loop.weighted.shared_rank 2)
  offline=(--sft.test_share 0.1 --sft.lora.rank 2 --sft.fit.max_steps 2) again=(--ric.replay_rows 8) goals=(--limit 8)
  conflicts=5 realign=(--dpo.test_share 0.5 --dpo.fit.learning_rate 1e-3) select=(--margin -9)
  refine=(--reviewing.max_new_tokens 8 --rewriting.max_new_tokens 8) segment='shortest: 2, longest: 4, tries: 3'
else
  value=() scorer=(--reward.max_length 192 --reward.test_share 0.1 --reward.fit.epochs 1) trees=(--limit 80 --growth.layers 4)
  model_of_values=(--value.fit.epochs 1 --value.fit.learning_rate 2e-4 --value.lora.rank 16 --value.lora.alpha 32)
  rounds=() ppo=() dpo_online=()
  offline=() again=(--ric.replay_rows 240 --sft.fit.max_steps 40 --sft.fit.learning_rate 2e-4) goals=(--limit 240 --seed 5)
  conflicts=48 realign=(--dpo.test_share 0.1 --dpo.fit.learning_rate 5e-5) select=()
  refine=(--reviewing.max_new_tokens 48 --rewriting.max_new_tokens 40) segment='shortest: 8, longest: 16, tries: 8'
fi

# A reward of the objective $1 that reads the whole of a response that has begun (ARGS): OUT/scorer-OBJECTIVE/model.
scorer() {
  run train bradley_terry --config "$here/../recipes/helpful-reward.yaml" --model "$model" --pairs "$pairs" \
    --reward.objective "$1" "${scorer[@]}" --out "$out/scorer-$1"
}

# Trees of the reference and a model of their nodes' values: OUT/value-model.
value_model() {
  run grow --config "$here/../recipes/grow.yaml" "${asked[@]}" "${sampling[@]}" "${trees[@]}" --out "$out/trees"
  run label nodes --config "$here/../recipes/label-nodes.yaml" --model "$model" --trees "$out/trees" --rewards "$rewards" --out "$out/nodes"
  run train value_model --config "$here/../recipes/value-model.yaml" --labels "$out/nodes" "${model_of_values[@]}" --out "$out/value-model"
}

# Policies that learn online, by OUT/scale.json: `morlhf NAME WEIGHTS` OUT/morlhf-NAME/adapter, `online_dpo` OUT/online-dpo/adapter.
on_policy() { # a recipe goes before the options that differ from it
  local method=$1 recipe=$2
  shift 2
  run train "$method" --config "$here/../recipes/$recipe.yaml" "${asked[@]}" --rewards "$rewards" --statistics "$out/scale.json" "${rounds[@]}" "$@"
}
morlhf() { on_policy ppo morlhf "${ppo[@]}" --loop.weights "$2" --out "$out/morlhf-$1"; }
online_dpo() { on_policy online_dpo online-dpo "${dpo_online[@]}" --out "$out/online-dpo"; }

# Rewards-in-context on the bank and a round of its own, by OUT/scale.json: OUT/ric-online.
in_context() {
  local ric=(--config "$here/../recipes/ric.yaml" --normalisation "$out/scale.json")
  run train ric "${ric[@]}" --runs "[$out/bank]" --model "$model" "${offline[@]}" --out "$out/ric"
  run sample --in_context "$out/ric" --goals simplex "${asked[@]}" --split train --samples 1 "${goals[@]}" "${sampling[@]}" --out "$out/round"
  run score --run "$out/round" --model "$model" --rewards "$rewards"
  run train ric "${ric[@]}" --runs "[$out/round]" --replay "[$out/bank]" --ric.selection.by any_quantile --model "$out/ric/adapter" \
    "${offline[@]}" "${again[@]}" --out "$out/ric-online"
}

# The policies of `policies`, re-aligned on conflicts that they resolve at the weights $1, judged by soups at $2: OUT/sipo/OBJECTIVE/adapter.
sipo() {
  run sipo sample --out "$out/sipo/samples" --model "$model" --pairs "$pairs" --limit "$conflicts" --mixing "$tuned" --weights "$1" \
    "${sampling[@]}" --sampling.greedy true
  run sipo refine --out "$out/sipo/refined" --samples "$out/sipo/samples" --one_shot false --review_weights "$first=1" "${refine[@]}"
  run sipo score --out "$out/sipo/scores" --samples "$out/sipo/samples" --refined "$out/sipo/refined" --policies "$tuned" \
    --soups "$2" --held_out "$held_out"
  run sipo select --out "$out/sipo/selected" --scores "$out/sipo/scores" --unfinished keep --replay 0.5 --replay_pairs "$pairs" "${select[@]}"
  for name in "${objectives[@]}"; do
    run train dpo --model "$out/$name/adapter" --pairs "[labelled:$out/sipo/selected/pairs.jsonl]" --dpo.objectives "[$name]" \
      "${dpo[@]}" --dpo.nll 0.1 --dpo.fit.checkpoint_every 6 "${realign[@]}" --out "$out/sipo/$name"
  done
}
