"""What scores a completion: functions, classifiers, their calls and their cache."""
