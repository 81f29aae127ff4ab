//! Conditions: what is true of an object, with a reason and a sentence.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

api_struct! {
    /// One condition, in KubeVirt's shape.
    Condition {
        /// What it is about.
        #[serde(rename = "type")]
        type_: String,
        /// `True`, `False` or `Unknown`.
        status: String,
        /// When it was last looked at.
        last_probe_time: Option<Time>,
        /// When `status` last changed.
        last_transition_time: Option<Time>,
        /// One word for machines.
        reason: Option<String>,
        /// One sentence for people.
        message: Option<String>,
    }
}

impl Condition {
    /// A condition that is true or false, without reason and message.
    pub fn new(type_: &str, status: bool) -> Self {
        let status = if status { "True" } else { "False" };
        Self { type_: type_.to_owned(), status: status.to_owned(), ..Self::default() }
    }

    /// The same with a reason and a message.
    pub fn because(self, reason: &str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { reason: Some(reason.to_owned()), message: (!message.is_empty()).then_some(message), ..self }
    }

    /// Whether `status` is `True`.
    pub fn is_true(&self) -> bool {
        self.status == "True"
    }

    /// Whether `status` is `False`.
    pub fn is_false(&self) -> bool {
        self.status == "False"
    }
}

/// A condition by its type.
pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// Whether the condition is there and `True`.
pub fn is_true(conditions: &[Condition], type_: &str) -> bool {
    find(conditions, type_).is_some_and(Condition::is_true)
}

/// Whether the condition is there and `False`.
pub fn is_false(conditions: &[Condition], type_: &str) -> bool {
    find(conditions, type_).is_some_and(Condition::is_false)
}

/// Sets a condition; `lastTransitionTime` moves only when `status` changes. Says whether anything changed
/// (`lastProbeTime` alone does not count).
pub fn set(conditions: &mut Vec<Condition>, mut condition: Condition, now: &Time) -> bool {
    match conditions.iter_mut().find(|old| old.type_ == condition.type_) {
        Some(old) => {
            if (&old.status, &old.reason, &old.message) == (&condition.status, &condition.reason, &condition.message) {
                return false;
            }
            condition.last_transition_time =
                if old.status == condition.status { old.last_transition_time.clone() } else { Some(now.clone()) };
            condition.last_probe_time = condition.last_probe_time.or_else(|| old.last_probe_time.clone());
            *old = condition;
        }
        None => {
            condition.last_transition_time = Some(now.clone());
            conditions.push(condition);
        }
    }
    true
}

/// Removes a condition; says whether it was there.
pub fn remove(conditions: &mut Vec<Condition>, type_: &str) -> bool {
    let before = conditions.len();
    conditions.retain(|condition| condition.type_ != type_);
    conditions.len() != before
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transition_time_moves_only_with_the_status() {
        let time = |second| Time(jiff::Timestamp::from_second(second).unwrap());
        let mut conditions = Vec::new();
        assert!(set(&mut conditions, Condition::new("Ready", false).because("A", "a"), &time(1)));
        assert!(!set(&mut conditions, Condition::new("Ready", false).because("A", "a"), &time(2)));
        assert!(set(&mut conditions, Condition::new("Ready", false).because("B", "b"), &time(3)));
        assert_eq!(conditions[0].last_transition_time, Some(time(1)));
        assert!(set(&mut conditions, Condition::new("Ready", true), &time(4)));
        assert_eq!(conditions[0].last_transition_time, Some(time(4)));
        assert!(is_true(&conditions, "Ready") && remove(&mut conditions, "Ready") && conditions.is_empty());
    }
}
